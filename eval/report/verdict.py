"""What a table says, in five lines, from its cells and comparisons only: also where the table's own method loses."""

from collections.abc import Sequence

from ba_lora.config.schema import UNTUNED
from ba_lora.experiments.tables import Row
from eval.report.columns import ReportColumn
from eval.report.comparisons import Comparison
from eval.report.sheets import format_number, signed
from eval.report.stats import LEAST_SEEDS
from eval.report.table import ReportTable


def verdict(table: ReportTable) -> list[str]:
    """Return the five lines: what was run; where the own methods are ahead, where behind; what is open; who is best."""
    tested = any(one.p is not None for one in table.comparisons)
    how = " by a corrected test" if tested else " by an uncorrected interval, which decides nothing"
    return [
        _evidence(table),
        f"Ahead{how}: {_decided(table, better=True)}.",
        f"Behind{how}: {_decided(table, better=False)}.",
        _open(table),
        _best(table),
    ]


def _evidence(table: ReportTable) -> str:
    planned = len(table.spec.all_runs())
    counts = {len(cell.seeds) for (row, _), cell in table.cells.items() if cell.values and row.method != UNTUNED}
    seeds = "no seed" if not counts else f"{_range(counts)} seed{'s' if max(counts) > 1 else ''} a method"
    tested = sum(one.p is not None for one in table.comparisons)
    known = [one for one in table.comparisons if one.low is not None]
    over = "seeds and items" if any(one.num_items for one in known) else "seeds alone"
    if tested:
        kind = f"{tested} tests, of which {sum(one.is_significant for one in table.comparisons)} are significant"
    elif known:
        few = max(counts) < LEAST_SEEDS
        why = f"it takes {LEAST_SEEDS}" if few else ", ".join(sorted({one.untested for one in known}))
        kind = f"so no test ({why}), only 95 % intervals over {over}"
    else:
        kind = "no comparison"
    return f"Evidence: {len(table.provenance)} of {planned} runs, {seeds}, {kind}."


def _range(counts: set[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _sign(table: ReportTable, one: Comparison) -> int:
    """Return 1 where the focus is better for sure, −1 where it is worse, 0 where that is open: by its test, and only
    where the table has none at all by its interval."""
    tested = any(other.p is not None for other in table.comparisons)
    sign = one.sign if one.is_significant or not tested else 0
    return -sign if table.spec.column(one.column).better == "lower" else sign


def _decided(table: ReportTable, *, better: bool) -> str:
    """Return the comparisons that the own methods win, or lose, by pairs of methods."""
    wanted = 1 if better else -1
    chosen = [one for one in table.comparisons if _sign(table, one) == wanted]
    pairs: dict[tuple[str, str], list[Comparison]] = {}
    for one in chosen:
        pairs.setdefault((_name(table, one.focus), _name(table, one.other)), []).append(one)
    link = "over" if better else "under"
    told = [f"{ours} {link} {theirs} in {_places(table, found)}" for (ours, theirs), found in pairs.items()]
    total = sum(one.low is not None for one in table.comparisons)
    return f"{len(chosen)} of {total} comparisons ({'; '.join(told)})" if told else f"none of {total} comparisons"


def _places(table: ReportTable, found: Sequence[Comparison]) -> str:
    """Return `column (block difference, …), …` of comparisons between two methods."""
    by_column: dict[str, list[str]] = {}
    for one in found:
        column = table.spec.column(one.column)
        words = [table.spec.label(word) for word in _block_words(table, one.focus)]
        label = f"“{column.label}”" if "," in column.label else column.label
        by_column.setdefault(label, []).append(" ".join([*words, signed(one.difference, column.decimals)]))
    return ", ".join(f"{label} ({'; '.join(places)})" for label, places in by_column.items())


def _open(table: ReportTable) -> str:
    known = [one for one in table.comparisons if one.low is not None]
    pairs: dict[tuple[str, str], list[int]] = {}
    for one in known:
        pairs.setdefault((_name(table, one.focus), _name(table, one.other)), []).append(_sign(table, one))
    num_open = sum(sign == 0 for signs in pairs.values() for sign in signs)
    whole = [f"all {len(s)} of {ours} against {theirs}" for (ours, theirs), s in pairs.items() if not any(s)]
    named = f", {', '.join(whole)}" if whole else ""
    by_chance = ""
    if num_open < len(known) >= 20 and all(one.p is None for one in known):
        by_chance = f"; of {len(known)} such intervals about {0.05 * len(known):.0f} miss 0 by chance"
    return f"Open: {num_open} of {len(known)} comparisons{named}{by_chance}."


def _best(table: ReportTable) -> str:
    """Return who has the best mean in the first ranked column of each block, and which runs collapsed."""
    spec = table.spec
    column: ReportColumn | None = next(
        (one for one in spec.columns if one.better != "none" and one.name != spec.choose), None
    )
    if column is None:
        return "Best: no column is ranked."
    best = [row for row in spec.rows if table.cell(row, column).mark == "best"]
    told = [
        f"{_name(table, row)} {format_number(table.cell(row, column).mean, column.decimals)}"
        + (f" ({', '.join(spec.label(word) for word in words)})" if (words := _block_words(table, row)) else "")
        for row in best
    ]
    lost = {
        f"{cell.num_collapsed} of {cell.num_planned} {_name(table, row)}"
        + (f" ({', '.join(spec.label(word) for word in words)})" if (words := _block_words(table, row)) else "")
        for row in spec.rows
        if (cell := table.cell(row, column)).num_collapsed
    }
    collapsed = f" Collapsed runs: {', '.join(sorted(lost))}." if lost else ""
    return f"Best {column.label}: {', '.join(told) or 'none'}.{collapsed}"


def _name(table: ReportTable, row: Row) -> str:
    words = [row.method] if "setting" in table.spec.compare_within or not row.setting else [row.method, row.setting]
    return ", ".join(table.spec.label(word) for word in words)


def _block_words(table: ReportTable, row: Row) -> list[str]:
    """Return what tells the row's block from the others, "" left out."""
    varied = [key for key in table.spec.compare_within if len({getattr(one, key) for one in table.spec.rows}) > 1]
    return [word for key in varied if (word := getattr(row, key))]
