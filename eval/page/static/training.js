// Figures and notes: the comparisons as a table.

function startTraining() {
  const page = taken.get("page"), holder = byId("comparisons");
  if (!holder) return;
  const name = (row) => page.rows[row].names.filter(Boolean).join(", ");
  holder.append(plainTable(["column", "rows", "against", "difference", "95 % interval", "p", "p, corrected", "items"], page.comparisons.map((one) => {
    const column = page.columns.find((of) => of.name === one.column), place = page.columns.indexOf(column);
    const number = (value) => signed(value, column.decimals);
    const link = column.task ? el("a", { href: `#/compare/${place}/${one.focus}/${one.other}` }, number(one.difference)) : number(one.difference);
    const interval = one.low == null ? one.untested ?? "" : `${number(one.low)} to ${number(one.high)}${one.num_items == null ? ` (${one.untested})` : ""}`;
    return [column.label, name(one.focus), name(one.other), link, interval, plain(one.p), `${plain(one.p_adjusted)}${one.is_significant ? " *" : ""}`, plain(one.num_items)];
  })));
}
