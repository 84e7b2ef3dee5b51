"""`python -m bench.report JSON ... --out DIR`: pytest-benchmark's JSON as one Markdown page and PNG plots."""

import argparse
import io
import json
import math
import os
import statistics
import sys
from collections import defaultdict
from pathlib import Path

OURS = "minkernels"
REFERENCE = "reference"  # which says what is right, not what is fast
RATES = {"gflops": "GFLOP/s", "gbytes_per_s": "GB/s", "tokens_per_s": "tokens/s"}


class ReportError(Exception):
    """What is wrong with the input, in one line for the user."""


def load(path: Path) -> dict:
    """The JSON of one benchmark run."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(f"{path}: no such file") from None
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ReportError(f"{path}: not a text file") from None
    except json.JSONDecodeError as error:
        raise ReportError(f"{path}: not complete JSON ({error}); was the run cut off?") from None
    rows = data.get("benchmarks") if isinstance(data, dict) else None
    if not isinstance(rows, list) or not isinstance(data.get("machine_info"), dict):
        raise ReportError(f"{path}: JSON, but not written by pytest --benchmark-json")
    if not rows:
        raise ReportError(f"{path}: a benchmark run without a single result")
    for row in rows:
        if not {"op", "case", "impl", "device", "dtype"} <= row["extra_info"].keys():
            raise ReportError(f"{path}: a benchmark, but not of this suite: {row['name']} has no op, case and impl")
    return data


class Row:
    """One implementation of one case."""

    def __init__(self, row: dict, peaks: dict[str, float]):
        info, stats = row["extra_info"], row["stats"]
        self.device, self.op, self.case, self.impl = info["device"], info["op"], info["case"], info["impl"]
        self.length, self.series = info.get("length"), info.get("series")
        self.median, self.seconds, self.rounds = stats["median"], stats.get("data", []), stats["rounds"]
        self.peak_mib, self.error = info.get("peak_extra_mib"), info.get("error")
        self.rate_name, self.rate = next(((name, info[name]) for name in RATES if info.get(name)), (None, None))
        ceiling = peaks.get({"gflops": info["dtype"], "gbytes_per_s": "copy"}.get(self.rate_name))
        self.share = self.rate / ceiling if ceiling else None  # of what the machine was measured to do

    def speedup_over(self, other: "Row") -> tuple[float, float, float]:
        """Median, first and third quartile of other / self, round by round: the rounds ran side by side."""
        if len(self.seconds) != len(other.seconds) or len(self.seconds) < 2:
            return (other.median / self.median,) * 3
        q1, q2, q3 = statistics.quantiles([b / a for a, b in zip(self.seconds, other.seconds, strict=True)], method="inclusive")
        return q2, q1, q3


def group(runs: list[dict]) -> dict[tuple[str, str], dict[str, dict[str, Row]]]:
    """{(device, op): {case: {impl: Row}}}. A later run's row replaces an earlier one's."""
    tables = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        peaks = run["machine_info"].get("minkernels", {}).get("peaks", {})
        for data in run["benchmarks"]:
            row = Row(data, peaks)
            tables[row.device, row.op][row.case][row.impl] = row
    return tables


def best_peer(case: dict[str, Row]) -> Row | None:
    """The fastest one that is not ours, called in another way maybe."""
    peers = (row for name, row in case.items() if not name.startswith(OURS) and name != REFERENCE)
    return min(peers, key=lambda row: row.median, default=None)


def markdown(runs: list[dict], plots: list[str]) -> str:
    tables = group(runs)
    lines = ["# Benchmarks", "", *_machines(runs), "", HOW_TO_READ, "## Ours against the best peer", ""]
    lines += ["| device | op | case | ours, ms | best peer | its ms | speedup | quartiles |"]
    lines += ["|---|---|---|--:|---|--:|--:|--:|"]
    for (device, op), cases in tables.items():
        for name, case in cases.items():
            ours, peer = case.get(OURS), best_peer(case)
            if not ours:
                lines.append(f"| {device} | {op} | {name} | **no result** | | | | |")
            elif peer:
                ratio, low, high = ours.speedup_over(peer)
                mark = f"{ratio:.2f}x" if ratio >= 1 else f"**{ratio:.2f}x, slower**"
                times = f"{_ms(ours)} | {peer.impl} | {_ms(peer)}"
                lines.append(f"| {device} | {op} | {name} | {times} | {mark} | {low:.2f} to {high:.2f} |")
    lines += ["", *(f"![{name}]({name})" for name in plots)]
    for (device, op), cases in tables.items():
        lines += ["", f"## {op} on {device}", "", *_table(cases)]
    return "\n".join(lines) + "\n"


HOW_TO_READ = """\
All implementations of a case ran in turn, A B A B ..., in one process; times are medians. A speedup is the other's time over
ours, round by round (median, then quartiles): below 1 ours is slower. "% of peak" sets the rate beside what this machine was
measured to do on a large matrix product of that dtype, or on a large copy. "extra MiB" is the memory that one call needs on
top of its inputs, its results included. "error" is max |x - fp64 reference| over the results.
"""


def _machines(runs):
    lines = []
    for run in runs:
        machine, commit = run["machine_info"], run.get("commit_info") or {}
        ours = machine.get("minkernels", {})
        cpu = machine.get("cpu", {})
        about = [f"CPU {cpu.get('brand_raw', 'unknown')} x{cpu.get('count', '?')}, {ours.get('threads', '?')} threads"]
        if ours.get("load") is not None:
            about.append(f"load average {ours['load']:.1f} as it began")
        if ours.get("device_name"):
            about.append(f"GPU {ours['device_name']}, driver {ours.get('driver')}, L2 {ours.get('l2_bytes', 0) >> 20} MiB")
        about.append(f"Python {machine.get('python_version')}, torch {ours.get('torch')}, triton {ours.get('triton')}")
        backends = ours.get("info", {}).get("backends", {})
        about += [f"{op} by {serving[ours['device'].upper()]}" for op, serving in backends.items()]
        changed = " with changes" if commit.get("dirty") else ""
        about.append(f"minkernels {ours.get('minkernels')}, commit {str(commit.get('id'))[:12]}{changed}")
        about.append(f"{str(run.get('datetime'))[:16]} UTC")
        peaks = ours.get("peaks", {})
        rates = [f"{name} product {_number(rate)} GFLOP/s" for name, rate in peaks.items() if name != "copy"]
        rates += [f"copy {_number(peaks['copy'])} GB/s read plus written"] if "copy" in peaks else []
        about.append(f"measured peaks: {', '.join(rates) or 'none'}")
        line = "- " + "; ".join(about)
        lines += [line] if line not in lines else []
    return lines


def _table(cases):
    rates = [name for name in RATES if any(row.rate_name == name for case in cases.values() for row in case.values())]
    shares = any(row.share for case in cases.values() for row in case.values())
    head = ["case", "implementation", "median ms", "rounds", "ours against it", *(RATES[rate] for rate in rates)]
    head += ["% of peak"] * shares + ["extra MiB", "error"]
    yield "| " + " | ".join(head) + " |"
    yield "|---|---" + "|--:" * (len(head) - 2) + "|"
    for name, case in cases.items():
        ours = case.get(OURS)
        for i, row in enumerate(sorted(case.values(), key=lambda row: row.median)):
            cells = [name if i == 0 else "", f"**{row.impl}**" if row.impl == OURS else row.impl, _ms(row), row.rounds]
            cells.append(f"{ours.speedup_over(row)[0]:.2f}x" if ours and row is not ours else "")
            cells += [_number(row.rate if row.rate_name == rate else None) for rate in rates]
            cells += [f"{row.share:.0%}" if row.share else ""] * shares
            cells += ["not readable" if row.peak_mib is None else f"{row.peak_mib:.1f}", f"{row.error:.1e}"]
            yield "| " + " | ".join(map(str, cells)) + " |"


def _ms(row):
    return f"{row.median * 1e3:.3g}" if row.median < 1 else f"{row.median * 1e3:.0f}"


def _number(x):
    return "" if x is None else f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def draw(runs: list[dict]) -> dict[str, bytes]:
    """{file name: PNG}: ours over the best peer, and rate against length for each op that has lengths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tables = group(runs)
    figures = {"speedup.png": _speedups(plt, tables)}
    for (device, op), cases in tables.items():
        name = f"{op}-{device}-by-length.png".replace(" ", "-").replace("+", "-").lower()
        figures[name] = _lengths(plt, device, op, cases)
    pictures = {}
    for name, figure in figures.items():
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
            plt.close(figure)
            pictures[name] = buffer.getvalue()
    return pictures


def _speedups(plt, tables):
    bars = []
    for (device, op), cases in tables.items():
        for name, case in cases.items():
            ours, peer = case.get(OURS), best_peer(case)
            if ours and peer:
                label = f"{op}: {name}" + ("" if device == "cpu" else f" ({device})")
                bars.append((label, ours.speedup_over(peer), peer.impl))
    if not bars:
        return None
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.27 * len(bars)))
    for y, (_, (ratio, low, high), peer) in enumerate(bars):
        axes.barh(y, ratio - 1, left=1, color="tab:green" if ratio >= 1 else "tab:red", height=0.7)
        axes.plot([low, high], [y, y], color="black", linewidth=1)
        axes.annotate(f"{ratio:.2f}x {peer}", (max(high, 1), y), (4, 0), textcoords="offset points", va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    largest = max(2, *(high for _, (_, _, high), _ in bars))
    axes.set_xlim(min(0.5, *(low for _, (_, low, _), _ in bars)) / 1.1, largest * 2.2)
    ticks = [2.0**i for i in range(math.floor(math.log2(axes.get_xlim()[0])) + 1, math.ceil(math.log2(largest)) + 1)]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel("time of the best peer over ours; the line spans the quartiles of the rounds")
    axes.set_title("minkernels against the best peer of each case (right of 1x: faster)")
    return figure


def _lengths(plt, device, op, cases):
    curves = defaultdict(lambda: defaultdict(dict))  # series, impl, length: TFLOP/s
    for case in cases.values():
        for row in case.values():
            if row.length and row.rate_name == "gflops":
                curves[row.series][row.impl][row.length] = row.rate
    curves = {series: impls for series, impls in curves.items() if max(map(len, impls.values())) > 2}
    if not curves:
        return None
    figure, axes = plt.subplots(1, len(curves), figsize=(1 + 4.2 * len(curves), 3.8), squeeze=False)
    unit, scale = ("GFLOP/s", 1) if device == "cpu" else ("TFLOP/s", 1e-3)
    names = sorted({name for impls in curves.values() for name in impls}, key=lambda name: (name != OURS, name))
    for panel, (series, impls) in zip(axes[0], curves.items(), strict=True):
        for i, name in enumerate(names):
            if name in impls:
                lengths, rates = zip(*sorted(impls[name].items()), strict=True)
                width = 2.5 if name == OURS else 1.2
                panel.plot(lengths, [rate * scale for rate in rates], color=f"C{i}", marker="o", linewidth=width, label=name)
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, [str(length) for length in lengths])
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.set_title(series)
        panel.set_xlabel("queries and keys")
    axes[0][0].set_ylabel(unit)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"{op} on {device}")
    figure.tight_layout()
    return figure


def write(path: Path, data: bytes):
    """Beside, then renamed: a reader never sees half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(data)
    beside.replace(path)


def make(paths: list[Path], out: Path) -> Path:
    """Writes report.md and its plots to out; returns the path of report.md."""
    runs = [load(path) for path in paths]
    try:
        out.mkdir(parents=True, exist_ok=True)
        pictures = draw(runs)
        for name, picture in pictures.items():
            write(out / name, picture)
        write(out / "report.md", markdown(runs, list(pictures)).encode())
    except OSError as error:
        raise ReportError(f"{out}: {error.strerror}") from None
    return out / "report.md"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("json", nargs="+", type=Path, help="files of pytest --benchmark-json")
    parser.add_argument("--out", type=Path, required=True, help="folder for report.md and the plots")
    args = parser.parse_args(argv)
    try:
        print(make(args.json, args.out))
    except ReportError as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
