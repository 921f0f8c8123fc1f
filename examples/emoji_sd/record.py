"""What was measured while training, stage by stage, in one JSON file beside the pipeline."""

import json
import platform
from pathlib import Path

import diffusers
import torch
import transformers


def processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def thinned(records: list[dict], count: int = 40) -> list[dict]:
    """About `count` records, evenly spaced, the last among them; their losses are averages over those left out."""
    size = max(1, len(records) // count)
    result = []
    for start in range(0, len(records), size):
        part = records[start : start + size]
        means = {k: round(sum(r[k] for r in part) / len(part), 5) for k in part[0] if k not in ("step", "seconds")}
        result.append({"step": part[-1]["step"], "seconds": part[-1]["seconds"]} | means)
    return result


def write_log(run: Path, path: Path, **more) -> None:
    stages = {}
    for file in sorted(run.glob("*.jsonl")):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        stages[file.stem] = {"steps": records[-1]["step"], "seconds": records[-1]["seconds"], "curve": thinned(records)}
    versions = {m.__name__: m.__version__ for m in (torch, diffusers, transformers)}
    log = {
        "device": {"processor": processor(), "threads": torch.get_num_threads(), "autocast": "bfloat16"},
        "versions": versions | {"python": platform.python_version()},
        "stages": stages,
    }
    path.write_text(json.dumps(log | more, indent=1) + "\n")
