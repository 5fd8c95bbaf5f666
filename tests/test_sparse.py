"""Latents of sparse autoencoders as units: the encoders of each library, their density, and dissections of them."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from broden_sets import write_trap_set
from dissection_models import Net, ViT, preprocess
from torch import nn
from words_sets import WORDS, PlantedClip, PlantedUnits, write_images
from words_sets import preprocess as word_preprocess

from torchprobe import cli
from torchprobe.datasets import Broden
from torchprobe.dissection import Dissection, SparseBasis, SparseEncoder, dissect, read_basis, sparse_basis
from torchprobe.dissection import bases as bases_module
from torchprobe.dissection.report import Report
from torchprobe.dissection.sparse import Density
from torchprobe.dissection.words import WordDissection, dissect_words
from torchprobe.dissection.words import passes as passes_module
from torchprobe.encoders import EncoderError
from torchprobe.studies.dissect import dissect_folder, write_pages

D, K = 12, 30


@pytest.fixture(scope="module")
def broden(tmp_path_factory):
    return Broden(write_trap_set(tmp_path_factory.mktemp("broden"), images=16, seed=0).root)


def parts(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    names = {"W_enc": (D, K), "b_enc": (K,), "W_dec": (K, D), "b_dec": (D,)}
    return {name: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in names.items()}


def latents(x, w, b, c, kind="relu", threshold=None, k=None):
    """In NumPy, one vector at a time."""
    z = (np.float64(x) - (0 if c is None else np.float64(c))) @ np.float64(w) + np.float64(b)
    if kind == "jumprelu":
        return np.where(z > np.float64(threshold), z, 0)
    z = np.maximum(z, 0)
    if kind == "topk":
        for row in z:
            row[np.argsort(-row, kind="stable")[k:]] = 0
    return z


def vectors(count=40, offset=0.0):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(9)) + offset


# -- the encoders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
def test_the_formulas(kind, offset):
    p, x = parts(), vectors(offset=offset)
    p["b_dec"] = p["b_dec"] + offset
    threshold = torch.rand(K, generator=torch.Generator().manual_seed(1)).double() * 3
    options = {"jumprelu": {"threshold": threshold}, "topk": {"top_k": 4}}.get(kind, {})
    encoder = SparseEncoder(p["W_enc"].T, p["b_enc"], p["b_dec"], **options)
    want = latents(x, p["W_enc"], p["b_enc"], p["b_dec"].float(), kind, threshold, 4)
    found = encoder(x).double().numpy()
    near = (
        np.abs((np.float64(x) - np.float64(p["b_dec"].float())) @ np.float64(p["W_enc"]) + np.float64(p["b_enc"]) - np.float64(threshold))
        < 1e-4
    )
    wrong = ~np.isclose(found, want, rtol=1e-4, atol=2e-5 * max(1, offset / 100))
    assert not bool((wrong & ~(near if kind == "jumprelu" else False)).any())
    if kind == "topk":
        assert ((found > 0).sum(1) <= 4).all()


def save(folder, tensors, config=None, name="sae_weights.safetensors"):
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    if config is not None:
        (folder / "cfg.json").write_text(json.dumps(config))
    return folder / name


def renamed(p, **names):
    return {names.get(key, key): value.T if names.get(key, "").endswith(".weight") else value for key, value in p.items()}


LAYOUTS = {
    "SAELens standard": (lambda p: p, {"architecture": "standard", "apply_b_dec_to_input": True}, ("relu", True)),
    "SAELens without subtraction": (lambda p: p, {"architecture": "standard", "apply_b_dec_to_input": False}, ("relu", False)),
    "SAELens jumprelu": (
        lambda p: p | {"threshold": torch.full((K,), 0.5)}, {"architecture": "jumprelu", "apply_b_dec_to_input": True}, ("jumprelu", True),
    ),
    "SAELens topk": (lambda p: p, {"architecture": "topk", "k": 4, "apply_b_dec_to_input": True}, ("topk", True)),
    "SAELens topk, older": (lambda p: p, {"activation_fn": "topk", "activation_fn_kwargs": {"k": 4}}, ("topk", True)),
    "Gemma Scope": (lambda p: p | {"threshold": torch.full((K,), 0.5)}, None, ("jumprelu", False)),
    "dictionary_learning relu": (
        lambda p: renamed(p, W_enc="encoder.weight", b_enc="encoder.bias", W_dec="decoder.weight", b_dec="bias"), None, ("relu", True),
    ),
    "dictionary_learning topk": (
        lambda p: renamed(p, W_enc="encoder.weight", b_enc="encoder.bias", W_dec="decoder.weight")
        | {"k": torch.tensor(4), "threshold": torch.tensor(-1.0)},
        None,
        ("topk", True),
    ),
    "dictionary_learning batch topk": (
        lambda p: renamed(p, W_enc="encoder.weight", b_enc="encoder.bias", W_dec="decoder.weight")
        | {"k": torch.tensor(4), "threshold": torch.tensor(0.5)},
        {"trainer": {"dict_class": "BatchTopKSAE", "k": 4}},
        ("jumprelu", True),
    ),
    "dictionary_learning batch topk, without its configuration": (
        lambda p: renamed(p, W_enc="encoder.weight", b_enc="encoder.bias", W_dec="decoder.weight") | {"threshold": torch.tensor(0.5)},
        None,
        ("jumprelu", True),
    ),
    "dictionary_learning jumprelu": (
        lambda p: p | {"threshold": torch.full((K,), 0.5)}, {"trainer": {"dict_class": "JumpReluAutoEncoder"}}, ("jumprelu", False),
    ),
    "dictionary_learning, decoder with its own bias": (
        lambda p: renamed(p, W_enc="encoder.weight", b_enc="encoder.bias", W_dec="decoder.weight", b_dec="decoder.bias"), None,
        ("relu", False),
    ),
    "rows": (lambda p: p | {"W_enc": p["W_enc"].T}, None, ("relu", True)),
    "sparsify": (lambda p: renamed(p, W_enc="encoder.weight", b_enc="encoder.bias"), {"k": 4, "activation": "topk"}, ("topk", True)),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_names_of_libraries(layout, tmp_path):
    rename, config, (kind, subtracted) = LAYOUTS[layout]
    p, x = parts(dtype=torch.float32), vectors()
    basis = read_basis(save(tmp_path / "sae", rename(p), config))
    assert isinstance(basis, SparseBasis)
    assert (basis.facts["activation"], basis.facts["subtract_center"]) == (kind, subtracted)
    want = latents(x, p["W_enc"], p["b_enc"], p["b_dec"] if subtracted else None, kind, 0.5, 4)
    np.testing.assert_allclose(basis.encode(x).numpy(), want, rtol=1e-4, atol=1e-5)
    assert basis.facts["name"] == "sae_weights.safetensors" and json.dumps(dict(basis.facts))


def test_other_files(tmp_path):
    p = {key: value.numpy() for key, value in parts(dtype=torch.float32).items()}
    np.savez(tmp_path / "params.npz", threshold=np.full(K, 0.5, np.float32), **p)
    assert read_basis(tmp_path / "params.npz").facts["activation"] == "jumprelu"
    torch.save({"state_dict": parts()}, tmp_path / "ae.pt")
    assert read_basis(tmp_path / "ae.pt").units(D, "x") == K
    np.save(tmp_path / "directions.npy", np.eye(D)[:3])
    assert torch.equal(read_basis(tmp_path / "directions.npy"), torch.eye(D)[:3])
    assert torch.equal(read_basis(save(tmp_path / "d", {"directions": torch.eye(D)})), torch.eye(D))


def test_decoder_norms_are_folded_in(tmp_path):
    p, x = parts(dtype=torch.float32), vectors()
    config = {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": True}
    norms = p["W_dec"].norm(dim=1)
    want = latents(x, p["W_enc"] * norms, p["b_enc"] * norms, p["b_dec"], "topk", k=4)
    np.testing.assert_allclose(read_basis(save(tmp_path / "a", p, config)).encode(x).numpy(), want, rtol=1e-4, atol=1e-5)
    turned = renamed(p, W_dec="decoder.weight")
    np.testing.assert_allclose(read_basis(save(tmp_path / "b", turned, config)).encode(x).numpy(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "config", "options", "message"),
    [
        (lambda p: {"a": p["W_dec"], "b": p["b_dec"]}, None, {}, "no encoder, which is called W_enc or encoder.weight; it has a, b"),
        (lambda p: p | {"r_mag": torch.ones(K)}, None, {}, r"a gated encoder \(r_mag\)"),
        (lambda p: p | {"k": torch.tensor(4), "threshold": torch.ones(K)}, None, {}, "both k = 4 and thresholds: say which"),
        (lambda p: p | {"log_threshold": torch.ones(K)}, None, {}, "it is unknown what log_threshold does to the latents"),
        (lambda p: p, {"activation": "groupmax"}, {}, r"an encoder of this kind \(groupmax\) cannot be read"),
        (lambda p: p, {"k": 4, "signed": True}, {}, r"an encoder of this kind \(signed\) cannot be read"),
        (lambda p: p, {"normalize_activations": "layer_norm"}, {}, r"activations are scaled before it \(layer_norm\)"),
        (lambda p: p, {"architecture": "topk"}, {}, "how many latents may be active is not in the file"),
        (lambda p: p, None, {"activation": "jumprelu"}, "no threshold for JumpReLU"),
        (lambda p: p, None, {"activation": "gelu"}, "activation must be one of relu, jumprelu, topk"),
        (lambda p: p | {"b_enc": torch.ones(3)}, None, {}, r"the bias of an encoder with 30 latents must be \(30,\), got \(3,\)"),
        (lambda p: p | {"W_enc": p["W_enc"] * torch.nan}, None, {}, "the weight of the encoder is not finite"),
        (lambda p: p | {"threshold": torch.linspace(-1, 1, K)}, None, {}, "a threshold of the encoder is negative"),
        (lambda p: p, None, {"top_k": 31}, "top_k must be between 1 and the number of latents, 30; got 31"),
        (lambda p: {"W_enc": p["W_enc"], "b_enc": p["b_enc"]}, {"rescale_acts_by_decoder_norm": True}, {}, "it has no decoder"),
        (lambda p: {"directions": torch.eye(3)}, None, {"top_k": 3}, "holds directions, which have no top_k"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, change, config, options, message):
    path = save(tmp_path / "sae", change(parts(dtype=torch.float32)), config)
    with pytest.raises((EncoderError, ValueError), match=message) as caught:
        read_basis(path, **options)
    assert str(path) in str(caught.value)


def test_damaged_files(tmp_path):
    for name, content in (("a.npy", b"x"), ("a.npz", b"x"), ("a.safetensors", b"x")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EncoderError, match=f"{name} cannot be read"):
            read_basis(tmp_path / name)
    np.savez(tmp_path / "o.npz", a=np.array([{"a": 1}], object))
    with pytest.raises(EncoderError, match=r"o\.npz cannot be read"):
        read_basis(tmp_path / "o.npz")
    path = save(tmp_path / "sae", parts())
    (tmp_path / "sae/cfg.json").write_text("{not json")
    with pytest.raises(EncoderError, match=r"cfg\.json is not JSON"):
        read_basis(path)


# -- dissections ---------------------------------------------------------------------------------------------------------


def latent_maps(model, basis, broden, layer="norm"):
    """The maps of latents of all images, one image at a time."""
    found = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: found.append(output))
    model.eval()
    with torch.no_grad():
        for row in range(len(broden)):
            model(preprocess(broden.image(row))[None])
    handle.remove()
    maps = torch.cat(found)
    return torch.stack([basis.encoder(each.flatten(1).T).T.reshape(-1, *each.shape[1:]) for each in maps])


@pytest.fixture(scope="module")
def basis():
    p = parts(seed=3, dtype=torch.float32)
    bias = p["b_enc"] * 0.2 - 1.5
    bias[7] = -1e6  # dead
    return SparseBasis(SparseEncoder(p["W_enc"].T, bias, p["b_dec"] * 0.1), "mine")


def test_latents_are_dissected_as_units(broden, basis):
    """The counts are those of a network that ends with the encoder."""

    class Encoded(Net):
        def __init__(self):
            super().__init__()
            self.latents = nn.Conv2d(D, K, 1)
            self.latents.weight.data = basis.encoder.weight[..., None, None]
            self.latents.bias.data = basis.encoder.bias - basis.encoder.weight @ basis.encoder.center
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.relu(self.latents(self.norm(self.conv(x))))

    options = {"preprocess": preprocess, "batch_size": 5, "quantile": 0.05}
    with pytest.warns(UserWarning, match="never active"):
        found = dissect(Net(), "norm", broden, basis=basis, **options)["norm"]
    with pytest.warns(UserWarning, match="never active"):
        want = dissect(Encoded(), "relu", broden, **options)["relu"]
    assert found.units == K and torch.allclose(found.thresholds, want.thresholds, atol=1e-5)
    assert torch.allclose(found.iou, want.iou, atol=2e-3) and torch.allclose(
        found.average_precision, want.average_precision, atol=2e-3, equal_nan=True
    )
    maps = latent_maps(Net(), basis, broden)
    assert torch.allclose(found.density.density, (maps > 0).double().mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(found.density.dead_share, 1 - (maps > 0).flatten(2).any(2).double().mean(0), atol=1e-12)
    assert found.density.dead.nonzero().flatten().tolist() == (maps <= 0).all(3).all(2).all(0).nonzero().flatten().tolist()
    assert bool(found.density.dead[7])
    assert found.metadata["basis"]["name"] == "mine" and json.dumps(found.metadata)


def test_density_is_in_every_output(broden, basis, tmp_path):
    with pytest.warns(UserWarning, match="never active"):
        found = dissect(Net(), "norm", broden, basis=basis, preprocess=preprocess, quantile=0.05)["norm"]
    summary = found.summary()["density"]
    assert summary["dead"] == int(found.density.dead.sum()) >= 1 and summary["dead_latents"] == summary["dead"] / K
    row = found.rows()[0]
    assert row["density"] == float(found.density.density[row["unit"]])
    for score in ("iou", "ap"):
        rows = list(csv.DictReader(found.to_csv(tmp_path / "a.csv", score=score).read_text().splitlines()))
        assert all(float(r["density"]) == float(found.density.density[int(r["unit"]) - 1]) for r in rows)
        assert all(float(r["dead_share"]) == float(found.density.dead_share[int(r["unit"]) - 1]) for r in rows)
    found.save(tmp_path / "a.safetensors")
    assert Dissection.load(tmp_path / "a.safetensors") == found
    report = Report(found)
    assert [fact.value for fact in report.facts()[:2]] == [str(K), str(summary["dead"])] and report.facts()[0].label == "Latents"
    assert {"density", "dead_share"} <= {column.key for column in report.columns()}
    net = Net()
    net.preprocess = preprocess
    text = found.report(tmp_path / "a.html", broden, net, basis=basis).read_text()
    assert "Dead latents" in text and "silent in" in text and "Latents of the encoder mine" in text
    plain = dissect(Net(), "norm", broden, preprocess=preprocess, score="ap")["norm"]
    assert plain.density is None and "density" not in plain.summary() and "density" not in plain.rows()[0]


def test_parts_are_merged(broden, basis):
    options = {"basis": basis, "preprocess": preprocess, "score": "ap", "keep_scores": True, "batch_size": 4}
    whole = dissect(Net(), "norm", broden, **options)["norm"]
    first = dissect(Net(), "norm", broden, rows=range(8), **options)["norm"]
    first.merge(dissect(Net(), "norm", broden, rows=range(8, 14), **options)["norm"])
    assert first.density == whole.density
    plain = dissect(Net(), "norm", broden, rows=range(3), preprocess=preprocess, score="ap", keep_scores=True)["norm"]
    with pytest.raises(ValueError, match="units 30 and 12"):
        first.merge(plain)


def test_interrupted_and_resumed(broden, basis, tmp_path):
    options = {"basis": basis, "preprocess": preprocess, "score": "ap", "batch_size": 4, "checkpoint_every": 0.0}
    whole = dissect(Net(), "norm", broden, **options)["norm"]
    calls = iter(range(100))
    with pytest.raises(KeyboardInterrupt):
        dissect(Net(), "norm", broden, checkpoint=tmp_path / "c", stop=lambda: next(calls) >= 2, **options)
    other = SparseBasis(SparseEncoder(basis.encoder.weight, top_k=3), "mine")
    with pytest.raises(ValueError, match="another sites"):
        dissect(Net(), "norm", broden, checkpoint=tmp_path / "c", resume=True, **options | {"basis": other})
    again = dissect(Net(), "norm", broden, checkpoint=tmp_path / "c", resume=True, **options)["norm"]
    assert again.density == whole.density and again == whole


def test_any_module_is_a_basis(broden):
    class Autoencoder(nn.Module):
        """Gated, as no file describes it; encode is called, not forward."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.gate, self.magnitude, self.dropout = nn.Linear(D, 20), nn.Linear(D, 20), nn.Dropout(0.5)

        def encode(self, x):
            return self.dropout((self.gate(x) > 0).float() * self.magnitude(x).relu())

        def forward(self, x):
            raise AssertionError

    module = Autoencoder().train()
    found = dissect(Net(), "norm", broden, basis={"norm": module}, preprocess=preprocess, score="ap", keep_scores=True)["norm"]
    assert found.units == 20 and module.training  # run in eval mode, but left as it was
    maps = latent_maps(Net(), SparseBasis(Wrapped(module)), broden)
    assert torch.allclose(found.scores, maps.amax((2, 3)).T, atol=1e-5)
    assert torch.allclose(found.density.density, (maps > 0).double().mean((0, 2, 3)), atol=1e-4)


class Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module.eval()

    def forward(self, x):
        found = self.module.encode(x)
        self.module.train()
        self.module.eval()
        return found


@pytest.mark.parametrize(
    ("basis", "message"),
    [
        (SparseBasis(SparseEncoder(torch.eye(5)), "five"), "the basis 'five' does not take the 12 features of layer 'norm'"),
        (nn.Linear(5, 9), "the basis 'Linear' does not take the 12 features"),
        (nn.Flatten(0), r"gives \(24,\) for 2 vectors"),
        (nn.LSTM(D, 3), "its encoder gives tuple"),
        ({"conv": nn.Linear(D, 3)}, "'conv', which is not dissected"),
    ],
)
def test_bases_that_do_not_fit(broden, basis, message):
    with pytest.raises(ValueError, match=message):
        dissect(Net(), "norm", broden, basis=basis, preprocess=preprocess)


def test_tokens_and_vectors(broden):
    p = parts(seed=5, dtype=torch.float32)
    encoder = SparseBasis(SparseEncoder(p["W_enc"][:8].T, top_k=2))
    for positions, dims in (("patch", 32), ("class", 1), ("all", 35)):
        found = dissect(ViT(), "block", broden, basis=encoder, positions=positions, preprocess=preprocess, score="ap")["block"]
        assert found.units == K and found.density.positions == dims * 14 and found.density.images == 14
        assert int(found.density.active.sum()) <= 2 * dims * 14
    pooled = dissect(Net(), "", broden, basis=SparseBasis(SparseEncoder(p["W_enc"].T)), preprocess=preprocess, score="ap")[""]
    assert pooled.density.positions == 14


def test_batches_fit_into_memory(broden, basis, monkeypatch):
    """Maps of latents may be many times those of the layer: then fewer images are read at a time, and the counts stay."""
    options = {"basis": basis, "preprocess": preprocess, "score": "ap", "keep_scores": True}
    whole = dissect(Net(), "norm", broden, batch_size=16, **options)["norm"]
    monkeypatch.setattr(bases_module, "MAPS", 4 * K * 8 * 8 * 3)
    largest = []
    encode = SparseBasis.encode

    def watched(self, maps):
        largest.append(len(maps))
        return encode(self, maps)

    monkeypatch.setattr(SparseBasis, "encode", watched)
    found = dissect(Net(), "norm", broden, batch_size=16, **options)["norm"]
    assert max(largest) == 3 and found.metadata["batch_size"] == 3 and whole.metadata["batch_size"] == 16
    assert torch.allclose(found.scores, whole.scores, atol=1e-5) and torch.allclose(found.density.density, whole.density.density, atol=1e-3)


def test_latents_and_words(tmp_path, monkeypatch):
    """Latents that undo a rotation of planted units, in blocks of images."""
    folder = write_images(tmp_path / "images", 100)
    planted = [3, 0, 5, 7]

    class Rotated(PlantedUnits):
        def __init__(self):
            super().__init__(planted)
            self.rotation = nn.Conv2d(10, 10, 1, bias=False)
            self.rotation.weight.data = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(0))).Q[..., None, None]

        def forward(self, images):
            held = self.maps
            self.maps = nn.Identity()
            units = super().forward(images)
            self.maps = held
            return self.rotation(units[..., None, None])

    undo = Rotated().rotation.weight[..., 0, 0].detach().T
    encoder = SparseEncoder(torch.cat([undo, -undo[:1]]), torch.cat([torch.zeros(10), torch.full((1,), -1e6)]))
    results = []
    for limit in (1 << 28, 4 * 11 * 7):
        monkeypatch.setattr(passes_module, "MAPS", limit)
        found = dissect_words(
            Rotated(), "rotation", folder, PlantedClip(), WORDS, templates=["{}"], basis=SparseBasis(encoder), permutations=39,
            preprocess=word_preprocess, measure="cosine_cubed",
        )["rotation"]  # fmt: skip
        results.append(found)
        assert found.units == 11 and {u: found.concepts.names[int(found.score[u].argmax())] for u in range(4)} == {
            u: WORDS[w] for u, w in enumerate(planted)
        }
        assert found.density.images == 100 and found.summary()["density"]["dead"] == 1
        assert found.best()[-1].unit == 10 and found.summary()["undefined_units"] == 1
    assert torch.allclose(results[0].score, results[1].score, atol=1e-6, equal_nan=True) and results[0].density == results[1].density
    found.save(tmp_path / "a.safetensors")
    back = WordDissection.load(tmp_path / "a.safetensors")
    assert back.density == found.density
    rows = list(csv.DictReader(found.to_csv(tmp_path / "a.csv").read_text().splitlines()))
    assert float(rows[-1]["density"]) == 0.0 and float(rows[-1]["dead_share"]) == 1.0
    text = found.report(tmp_path / "a.html").read_text()
    assert "Dead latents" in text and "Latents" in text


def test_a_study_of_latents(broden, basis, tmp_path):
    """A folder for a folder, with pages that show where latents are active."""
    net = Net()
    net.preprocess = preprocess
    with pytest.warns(UserWarning, match="never active"):
        results = dissect_folder(net, broden, "norm", tmp_path, basis=basis, quantile=0.05)
    files = write_pages(tmp_path, results, broden, net, basis=basis)
    assert "Dead latents" in files["norm"].read_text() and Dissection.load(tmp_path / "norm.safetensors").density == results["norm"].density
    assert json.loads((tmp_path / "summary.json").read_text())["layers"][0]["density"]["dead"] >= 1


def test_the_command(broden, tmp_path, capsys):
    pytest.importorskip("timm")
    path = save(tmp_path / "sae", {"W_enc": torch.randn(96, 20), "b_enc": -torch.ones(20), "b_dec": torch.zeros(96)})
    arguments = ["dissect", "timm:test_resnet", "--random-init", "--layers", "visual.layer4", "--broden", str(broden.root)]
    arguments += ["--score", "ap", "--basis", str(path), "--out", str(tmp_path / "out"), "--pictures", "0", "--device", "cpu"]
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert caught.value.code == 0, err
    layer = json.loads(out)["layers"][0]
    assert layer["units"] == 20 and layer["density"]["mean"] > 0 and layer["metadata"]["basis"]["activation"] == "relu"
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments, "--rotate"])
    assert caught.value.code == 2 and "--rotate and --basis exclude each other" in capsys.readouterr().err


# -- density -------------------------------------------------------------------------------------------------------------


def test_density_of_any_shape():
    density = Density(2)
    density.update(torch.tensor([[1.0, 0.0], [2.0, -1.0]]))  # vectors
    density.update(torch.zeros(3, 2, 4))  # tokens
    density.update(torch.ones(1, 2, 2, 2))  # maps
    assert density.active.tolist() == [6, 4] and density.positions == 2 + 12 + 4 and density.images == 6
    assert density.active_images.tolist() == [3, 1] and density.dead.tolist() == [False, False]
    again = Density(2)
    again.load_state_dict(density.state_dict())
    assert again == density and again.rows()[1] == {"density": 4 / 18, "dead_share": 1 - 1 / 6}
    for wrong in ({"active": torch.tensor([99, 0])}, {"active_images": torch.tensor([-1, 0])}, {"active": torch.tensor([1, 2, 3])}):
        with pytest.raises(ValueError, match="expected counts"):
            Density(2).load_state_dict(density.state_dict() | wrong)


def test_state_dicts_of_modules_are_read():
    """Those of dictionary_learning, for example."""
    module = nn.Module()
    module.encoder, module.decoder = nn.Linear(D, K), nn.Linear(K, D, bias=False)
    module.b_dec, module.k = nn.Parameter(torch.randn(D)), torch.tensor(5)
    found = sparse_basis({**module.state_dict(), "k": module.k})
    z = torch.relu(module.encoder(vectors() - module.b_dec))
    kept = z.topk(5, dim=1)
    assert torch.allclose(found.encode(vectors()), torch.zeros_like(z).scatter(1, kept.indices, kept.values), atol=1e-6)
