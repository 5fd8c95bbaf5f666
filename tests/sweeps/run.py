"""Every model of a library with and without recording.

    python -m tests.sweeps.run --library timm --mode eager --out results.json
    python -m tests.sweeps.run --library transformers --only 'clip*'

Each model runs plainly, then recorded in every scenario of the mode, and must give the same bits, raise nothing and keep nothing.
"""

from __future__ import annotations

import argparse
import collections
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .case import CannotBuild, Case, brief, forget, limit, quiet
from .check import MODES, Checker, Outcome, Scenario, one_thread
from .models import LIBRARIES, cases, missing

Result = dict[str, Any]

SUBSET = {
    "timm": "*/test_*,swin_*,metaformer/convformer_s18",
    "torchvision": "resnet18,swin_t,vit,mobilenet_v2,r3d_18,lraspp_*,raft_small,squeezenet*",
    "transformers": "bert,gpt2,llama,mixtral,t5,bart,clip,siglip,vit,convnext,swin,segformer,detr,wav2vec2,whisper,encodec,mamba,jamba,"
    "qwen2_vl,deberta-v2,longformer,patchtst,vits",
    "diffusers": "UNet1D*,UNet2D*,AutoencoderKL,AutoencoderOobleck,DiT*,PixArt*,SD3T*,Flux*,Wan*",
    "odd": "*",
    "own": "*/plain",
    "open_clip": "*",
}
"""What compiled mode takes unless told otherwise, since compiling is slow."""


def check_case(case: Case, scenarios: Sequence[Scenario], seconds: float = 120.0) -> Result:
    """The outcomes of one model, or the reason why it cannot be built."""
    start = time.perf_counter()
    result: Result = {"built": False, "note": "", "outcomes": {}}
    with one_thread(), quiet():
        try:
            with limit(seconds):
                built = case.build(0)
                result["note"] = built.note
                checker = Checker(built)
            result["built"] = True
        except (CannotBuild, TimeoutError) as reason:
            result["reason"] = str(reason)
        except Exception as error:
            result["reason"] = f"does not run: {brief(error)}"
        if result["built"]:
            for scenario in scenarios:
                try:
                    with limit(seconds):
                        outcome = checker.run(scenario)
                except TimeoutError as error:
                    outcome = Outcome("skipped", str(error))
                result["outcomes"][scenario.name] = asdict(outcome)
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def counts(results: dict[str, Result]) -> dict[str, Any]:
    """How many models were built, and how the scenarios went."""
    by_scenario: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for result in results.values():
        for name, outcome in result["outcomes"].items():
            by_scenario[name][outcome["status"]] += 1
            by_scenario[name].update({key: outcome[key] for key in ("layers", "unsure")}, warnings=len(outcome["warnings"]))
    built = [result for result in results.values() if result["built"]]
    good = sum(all(outcome["status"] != "failed" for outcome in result["outcomes"].values()) for result in built)
    return {
        "models": len(results),
        "built": len(built),
        "not built": len(results) - len(built),
        "without a failure": good,
        "scenarios": {name: dict(counter) for name, counter in by_scenario.items()},
    }


def failures(results: dict[str, Result]) -> list[str]:
    """One line for each scenario that failed."""
    return [
        f"{model}, {name}: {outcome['reason']}"
        for model, result in results.items()
        for name, outcome in result["outcomes"].items()
        if outcome["status"] == "failed"
    ]


def sweep(
    chosen: Iterable[Case], scenarios: Sequence[Scenario], seconds: float, out: Path | None = None, verbose: bool = True
) -> dict[str, Result]:
    results: dict[str, Result] = {}
    for case in chosen:
        results[case.name] = result = check_case(case, scenarios, seconds)
        if verbose:
            print(line(case.name, result), flush=True)
        if out is not None:
            out.write_text(json.dumps({"counts": counts(results), "models": results}, indent=1))
        forget()
    return results


def line(name: str, result: Result) -> str:
    if not result["built"]:
        return f"{name:50} not built: {result['reason'][:150]}"
    parts = [
        f"{scenario}: {o['status']}{' – ' + o['reason'][:110] if o['reason'] else ''}"
        for scenario, o in result["outcomes"].items()
        if o["status"] != "ok"
    ]
    return f"{name:50} {result['seconds']:6.1f} s  {'; '.join(parts) or 'ok'}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=LIBRARIES, required=True)
    parser.add_argument("--mode", choices=MODES, default="eager")
    parser.add_argument("--only", default=None, help="shell patterns for names, separated by commas")
    parser.add_argument("--scenarios", default=None, help="comma-separated names; default: all of the mode")
    parser.add_argument("--seconds", type=float, default=120.0, help="limit for one scenario of one model")
    parser.add_argument("--out", type=Path, default=None, help="a JSON file, written after every model")
    options = parser.parse_args(arguments)
    if package := missing(options.library):
        parser.error(f"{package} is not installed")
    pattern = options.only or (SUBSET[options.library] if options.mode == "compiled" else "*")
    scenarios = [s for s in MODES[options.mode] if options.scenarios is None or s.name in options.scenarios.split(",")]
    start = time.perf_counter()
    results = sweep(cases(options.library, pattern), scenarios, options.seconds, options.out)
    print(json.dumps({**counts(results), "seconds": round(time.perf_counter() - start)}, indent=1))
    return 1 if failures(results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
