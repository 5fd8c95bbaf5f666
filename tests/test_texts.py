"""Texts from files, and through a scan and an interpretation on the command line."""

import json

import hugging_face_models as models
import pytest
import torch
from safetensors.torch import load_file

from torchprobe.analysis import embed
from torchprobe.datasets import DatasetError, Texts, text_file
from torchprobe.encoders import load_encoder
from torchprobe.studies.scan import scan

TEXTS = ["a photo of a cat", "dogs", "the red car and the blue car", "a dog", "cats and dogs"]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    models.language_model(folder, "GPT2LMHeadModel")
    return folder


def names(texts):
    return [texts.name(path) for path in texts.paths]


def test_lines_and_json_lines(tmp_path):
    (tmp_path / "t.txt").write_bytes("﻿one\r\n\r\n  two words \nthree".encode())
    assert names(text_file(tmp_path / "t.txt")) == ["1: one", "3: two words", "4: three"]
    (tmp_path / "t.jsonl").write_text('{"caption": "one", "id": 3}\n"two"\n\n{"text": "line\\nbreak"}\n')
    texts = text_file(tmp_path / "t.jsonl")
    assert [texts.texts[path] for path in texts.paths] == ["one", "two", "line\nbreak"]
    assert len(text_file(tmp_path / "t.jsonl", limit=2)) == 2


def test_long_texts_that_begin_alike_have_names_of_their_own():
    a, b = names(Texts.of(["a" * 100 + "b", "a" * 100 + "c"]))
    assert a[3:80] == b[3:80] and a[3:] != b[3:] and len(a) < 110


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("t.txt", b"", "no texts"),
        ("t.txt", b" \n\n", "no texts"),
        ("t.txt", b"caf\xe9\n", "cannot be read as UTF-8"),
        ("t.txt", b"x" * ((1 << 20) + 2), "line 1: more than 1,048,576 characters"),
        ("t.jsonl", b'"a"\n{"text": 3}\n', "line 2: expected a string"),
        ("t.jsonl", b'"a"\n[[[\n', "line 2: not JSON"),
        ("t.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("t.JSONL", b'"a"\n[1]\n', "line 2: expected a string"),
        ("t.ndjson", b"a\n", "line 1: not JSON"),
        ("t.json", b'["a", "b"]', "is JSON, whose lines are no texts"),
        ("t.jsonl", b'"a"\n"' + b"x" * 100 + b'\\ud800"\n', "line 2: the text has half of a surrogate pair"),
        ("t.jsonl", b'{"body": "x"}\n', "line 1: expected a string, or an object with a string under text, caption"),
    ],
)
def test_files_that_hold_no_texts(tmp_path, file, content, message):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        text_file(tmp_path / file)


def test_padding_is_in_no_number(gpt2):
    encoder, texts = load_encoder(f"hf:{gpt2}"), Texts.of(TEXTS)
    alone, together = (scan(encoder, texts, batch_size=size) for size in (1, 5))
    lengths = [int(encoder.preprocess(text).shape[1]) for text in TEXTS]
    for layer in ("text.h.0", "text.h.1"):
        one, all_ = alone.recording[layer], together.recording[layer]
        assert one.vectors == all_.vectors == sum(lengths)
        assert all_.vector_kurtosis == pytest.approx(one.vector_kurtosis, rel=1e-5)
        torch.testing.assert_close(all_.mean, one.mean, rtol=1e-4, atol=1e-7)
    assert together.headline.vector_kurtosis == pytest.approx(alone.headline.vector_kurtosis, rel=1e-5)
    h = embed(encoder, texts, batch_size=2)
    torch.testing.assert_close(h.h, encoder.encode_text(TEXTS), rtol=1e-4, atol=1e-6)
    assert h.ids[1] == "2: dogs"


def test_a_text_without_tokens_is_named(gpt2):
    encoder = load_encoder(f"hf:{gpt2}")

    def preprocess(text):
        return encoder.preprocess(text)[:, :0] if text == "dogs" else encoder.preprocess(text)

    batch = next(Texts.of(TEXTS).batches(preprocess, 5))
    assert batch.unreadable == [("2: dogs", "ValueError: the text has no tokens")] and batch.pixels.shape[0] == 4


@pytest.mark.parametrize("command", ["scan", "interpret"])
def test_texts_on_the_command_line(gpt2, tmp_path, command, capsys):
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    from torchprobe.cli import main

    (tmp_path / "t.txt").write_text("\n".join(TEXTS))
    with pytest.raises(SystemExit) as left:
        main([command, f"hf:{gpt2}", "--texts", str(tmp_path / "t.txt"), "--out", str(tmp_path / "out"), "--representation", "mean"])
    assert left.value.code == 0
    assert (tmp_path / "out" / "index.html").is_file()
    if command == "scan":
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert summary["settings"]["representation"] == "mean" and summary["images"]["seen"] == 5
        assert "without class and register tokens" in (tmp_path / "out" / "index.html").read_text()
    else:
        (saved,) = (tmp_path / "out" / "embeddings").glob("*.safetensors")
        assert load_file(saved)["h"].shape == (5, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [([], "Missing option '--images' or '--texts'"), (["--images", "x", "--texts", "y"], "either --images or --texts")],
)
@pytest.mark.parametrize("command", ["scan", "interpret"])
def test_either_images_or_texts(command, options, message, capsys):
    from torchprobe.cli import main

    with pytest.raises(SystemExit) as left:
        main([command, "hf:x", *options])
    assert left.value.code == 2 and message in capsys.readouterr().err
