"""Plans published models on TPU slices, and writes the table of plans into docs/planning.md.

    make plan      or      PYTHONPATH=.:tokenizers python experiments/benchmarks/plan_table.py [CASE ...]

Compiles the training step of experiments/pretrain.py for each case, one after the other, with libtpu on this machine's
CPU (two to three CPU minutes per case, 3 GB), and writes the raw numbers to results/plans/. Cases with numbers there
are not compiled again unless they are named. Then it writes the table into docs/planning.md, between its marks.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ar_unified.planning.report import duration, size
from ar_unified.workdir import read_json, write_json, write_text

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results" / "plans"
_LORA = ("--config.lora.rank=16", "--config.lora.base_dtype=bfloat16")
# Name of the case -> model, chips, target, further words of the command.
CASES: dict[str, tuple[str, int, str, tuple[str, ...]]] = {
    "chameleon_7b-v5p-64": ("chameleon_7b", 64, "v5p:4x4x4", ()),
    "chameleon_7b-v5p-512": ("chameleon_7b", 512, "v5p:8x8x8", ()),
    "chameleon_34b-v5p-64": ("chameleon_34b", 64, "v5p:4x4x4", ()),
    "chameleon_34b-v5p-512": ("chameleon_34b", 512, "v5p:8x8x8", ()),
    "emu3_8b-v6e-256": ("emu3_8b", 256, "v6e:16x16", ()),
    "emu3_8b-v6e-256-offload": (
        "emu3_8b",
        256,
        "v6e:16x16",
        ("--config.model.remat=offload_attention",),
    ),
    "emu3_8b-v6e-2x256": ("emu3_8b", 512, "v6e:16x16,slices=2", ()),
    "emu3_8b-v5e-256": (
        "emu3_8b",
        256,
        "v5e:16x16",
        ("--config.training.batch_size=256", "--config.loss.chunk=1024", "--config.mesh.fsdp=128"),
    ),
    "lwm_7b-v5p-512": ("lwm_7b", 512, "v5p:8x8x8", ()),
    "chameleon_7b-7x-64": ("chameleon_7b", 128, "tpu7x:4x4x4", ()),  # a chip has two devices
    "emu3_8b-lora-v5e-16": ("emu3_8b", 16, "v5e:4x4", (*_LORA, "--config.training.batch_size=16")),
    "emu3_8b-full-v5e-16": (
        "emu3_8b",
        16,
        "v5e:4x4",
        ("--config.training.batch_size=16", "--config.mesh.fsdp=16", "--no-advice"),
    ),
    "chameleon_34b-v5e-16": ("chameleon_34b", 16, "v5e:4x4", ("--config.mesh.fsdp=16", "--no-advice")),
}
BEGIN, END = "<!-- plans: written by experiments/benchmarks/plan_table.py -->\n", "<!-- end of plans -->\n"


def command(case: str) -> list[str]:
    """The arguments of `ar-unified` for a case."""
    model, chips, target, more = CASES[case]
    return ["plan", "--config", f"experiments/pretrain.py:model={model},chips={chips}", "--target", target, *more]


def run(case: str) -> None:
    """Compiles one case in its own process, which frees its memory at the end."""
    print(f"==== {case}: ar-unified {' '.join(command(case))}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "ar_unified.cli.main", *command(case), "--output", folder]
        subprocess.run(words, cwd=ROOT, check=False)
        if (found := Path(folder) / "plan.json").exists():
            write_json(
                RESULTS / f"{case}.json", {"command": f"ar-unified {' '.join(command(case))}"} | read_json(found)
            )


def table(plans: dict[str, dict[str, Any]]) -> str:
    """The Markdown: a table with a row for each case, then a table of how far each plan scales."""
    head = (
        "| model | target | mesh | remat | tokens a step | peak of HBM | parameters + optimizer | "
        "gradients + activations | ICI sent | DCN sent | matmuls | ICI | DCN | host | memory | step | MFU | "
        "compiled in |"
    )
    lines, scaling = [head, "|" + " --- |" * (head.count("|") - 1)], []
    for case, plan in plans.items():
        model = CASES[case][0]
        mesh = " ".join(f"{axis} {n}" for axis, n in plan["mesh"].items() if n > 1)
        if not plan["programs"]:
            refused, remat = plan["refused"], plan["model"]["remat"]
            lines.append(
                f"| {model} | {plan['target']} | {mesh} | {remat} | | **refused: {size(refused['used'])} of "
                f"{size(refused['capacity'])}** | |" + " |" * 11
            )
            continue
        program = plan["programs"][0]
        where, seconds = program["memory"], program["seconds"]
        parts = where["parts"]
        low, high = program["mfu"]
        row = [
            model + (f" LoRA, rank {plan['lora']['rank']}" if plan.get("lora") else ""),
            plan["target"],
            mesh,
            plan["model"]["remat"],
            f"{program['tokens'] / 1e6:.2f}M",
            f"{size(where['peak'])} ({where['peak'] / where['capacity']:.0%})"
            + ("" if plan["fits"] else " **refused**"),
            size(parts["parameters"] + parts["optimizer"]),
            size(parts["gradients"] + parts["activations"]),
            size(program["sent"]["ICI"]),
            size(program["sent"]["DCN"]) if program["sent"]["DCN"] else "",
            duration(seconds["matmuls"]),
            duration(seconds["ICI"]),
            duration(seconds["DCN"]) if seconds["DCN"] else "",
            duration(seconds["host"]) if seconds.get("host") else "",
            duration(seconds["memory"]),
            f"{duration(program['fastest'])} to {duration(program['slowest'])}",
            f"{low:.0%} to {high:.0%}",
            f"{program['compile_seconds']:.0f} s",
        ]
        lines.append(f"| {' | '.join(row)} |")
        reach = program["scaling"]
        far = {0: "not here", None: "any number of slices"}.get(reach["largest"], f"{reach['largest'] or 0:,} chips")
        scaling.append(f"| {model} | {plan['target']} | {far} | {reach['breaks']} |")
    second = [
        "| model | target | matmuls bound a step up to | first to break |",
        "| --- | --- | --- | --- |",
        *scaling,
    ]
    return "\n".join([*lines, "", *second, ""])


def main(chosen: list[str]) -> None:
    """Plans the named or missing cases, and writes the table."""
    if unknown := sorted(set(chosen) - set(CASES)):
        raise SystemExit(f"plan_table.py: expected cases of {', '.join(CASES)}; found {', '.join(unknown)}")
    for case in CASES:
        if case in chosen or (not chosen and not (RESULTS / f"{case}.json").exists()):
            run(case)
    plans = {case: read_json(RESULTS / f"{case}.json") for case in CASES if (RESULTS / f"{case}.json").exists()}
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    write_text(ROOT / "docs" / "planning.md", before + BEGIN + table(plans) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main(sys.argv[1:])
