// Two methods side by side: the items on which they differ, with the numbers that the paired test used.

let compareState = { items: [], shown: [], answers: [], texts: null, list: null };

function startCompare() {
  for (const key of ["column", "a", "b"]) byId(`compare-${key}`).addEventListener("change", () => {
    location.hash = `/compare/${byId("compare-column").value}/${byId("compare-a").value}/${byId("compare-b").value}`;
  });
  byId("compare-kind").addEventListener("change", filterCompared);
  byId("compare-search").addEventListener("input", filterCompared);
  compareState.list = itemList(byId("compare-list"), {
    headings: ["item", "A", "B", "A − B"],
    label: "Items of two methods",
    count: () => compareState.shown.length,
    cell: (row, column) => {
      const one = compareState.items[compareState.shown[row]];
      return column === 0 ? one.id : column === 3 ? signed(one.a - one.b, 3) + (one.a > one.b ? " ▲" : one.a < one.b ? " ▼" : "") : plain(column === 1 ? one.a : one.b);
    },
    order: (column) => compareState.shown.map((place) => {
      const one = compareState.items[place];
      return column === 0 ? place : column === 1 ? one.a : column === 2 ? one.b : one.a - one.b;
    }),
    chosen: (row) => showPair(compareState.items[compareState.shown[row]]),
  });
}

/** Return item → mean value over the runs that the row's mean is of, the runs that have values, and why others have none. */
function valuesOf(row, column, values) {
  const page = taken.get("page");
  const wanted = page.rows[row].cells[column].runs ?? [];
  const runs = wanted.filter((id) => values.runs[id]);
  const sums = new Map();
  for (const id of runs) (values.other_ids[id] ?? values.ids).forEach((item, place) => sums.set(item, (sums.get(item) ?? []).concat(values.runs[id][place])));
  const found = new Map([...sums].filter(([, of]) => of.length === runs.length).map(([item, of]) => [item, mean(of)]));
  const reasons = wanted.filter((id) => values.untested[id]).map((id) => `${id}: ${values.untested[id]}`);
  return { runs, found, reasons };
}

async function showCompare([column, a, b]) {
  const page = taken.get("page"), choice = byId("compare-column");
  const places = [...choice.options].map((option) => option.value);
  const best = places.find((place) => page.columns[place].values) ?? places[0];
  if (best === undefined) return byId("compare-test").replaceChildren(el("p", {}, "No column of this table has items."));
  column = places.includes(column) ? column : best;
  const filled = [...page.rows.keys()].filter((row) => page.rows[row].cells[column].n);
  a = page.rows[a] ? Number(a) : filled[0] ?? 0;
  b = page.rows[b] ? Number(b) : filled.find((row) => row !== a) ?? a;
  choice.value = column;
  byId("compare-a").value = a;
  byId("compare-b").value = b;
  Object.assign(compareState, { column: Number(column), a, b, items: [], shown: [], answers: [], texts: null });
  byId("compare-item").replaceChildren();
  const shown = page.columns[column];
  const values = shown.values ? await need(shown.values) : { ids: [], runs: {}, untested: {}, other_ids: {} };
  const ours = valuesOf(a, column, values), theirs = valuesOf(b, column, values);
  compareState.items = [...ours.found].filter(([id]) => theirs.found.has(id)).map(([id, value]) => ({ id, a: value, b: theirs.found.get(id) }));
  compareState.items.sort((one, other) => one.id.localeCompare(other.id, "en", { numeric: true }));
  const runs = page.runs.filter((run) => ours.runs.includes(run.id) || theirs.runs.includes(run.id));
  const loaded = await Promise.all(runs.map((run) => loadAnswers(run, shown.task).catch(() => null))); // showPair says why
  Object.assign(compareState, { runs: [ours.runs, theirs.runs], answers: loaded.filter(Boolean), texts: null });
  const sign = shown.better === "lower" ? -1 : 1;
  for (const one of compareState.items) one.won = Math.sign(sign * (one.a - one.b));
  byId("compare-test").replaceChildren(...testView(page, shown, ours, theirs));
  filterCompared();
  if (compareState.shown.length) { compareState.list.mark(0); await showPair(compareState.items[compareState.shown[0]]); }
}

function testView(page, shown, ours, theirs) {
  const { a, b, items } = compareState;
  const won = items.filter((one) => one.won > 0).length, lost = items.filter((one) => one.won < 0).length;
  const lines = [];
  if (items.length) {
    const difference = shown.scale * (mean(items.map((one) => one.a)) - mean(items.map((one) => one.b)));
    lines.push(`A is better on ${won} items, B on ${lost}, no difference on ${items.length - won - lost}. A − B over ${items.length} items: ${signed(difference, shown.decimals)} (mean over ${ours.runs.length} and ${theirs.runs.length} runs).`);
  }
  const test = page.comparisons.find((one) => one.column === shown.name && [`${a} ${b}`, `${b} ${a}`].includes(`${one.focus} ${one.other}`));
  if (test) {
    const names = [test.focus, test.other].map((row) => page.rows[row].names.filter(Boolean).join(", "));
    const between = test.low == null ? "" : `, 95 % interval ${signed(test.low, shown.decimals)} to ${signed(test.high, shown.decimals)}`;
    const p = test.p == null ? `; no test: ${test.untested}` : `; p = ${plain(test.p)}, corrected ${plain(test.p_adjusted)}${test.is_significant ? " (significant)" : ""}`;
    lines.push(`Paired test of the report, ${names[0]} − ${names[1]}: ${signed(test.difference, shown.decimals)}${between}${p}${test.num_items == null ? "" : ` (${test.num_items} items)`}.`);
  } else lines.push("The report does not test these two rows against each other.");
  return [...lines, ...[...ours.reasons, ...theirs.reasons].map((reason) => `No items of ${reason}.`)].map((line) => el("p", {}, line));
}

function filterCompared() {
  const kind = byId("compare-kind").value, words = byId("compare-search").value.toLowerCase();
  const wanted = { differ: (one) => one.won !== 0, won: (one) => one.won > 0, lost: (one) => one.won < 0, "": () => true }[kind];
  if (words) compareState.texts ??= textsByItem(compareState.answers);
  compareState.shown = [];
  compareState.items.forEach((one, place) => {
    if (wanted(one) && (!words || one.id.toLowerCase().includes(words) || (compareState.texts.get(one.id) ?? "").includes(words))) compareState.shown.push(place);
  });
  byId("compare-count").textContent = `${compareState.shown.length} of ${compareState.items.length} items`;
  compareState.list.refresh();
}

/** Return item → what the search looks through: the runs' texts; the turns and samples of one item are one text. */
function textsByItem(runs) {
  const found = new Map();
  for (const answers of runs) {
    const texts = searchedTexts(answers);
    answers.id.forEach((id, place) => {
      for (const key of new Set([id, id.split("/").slice(0, 2).join("/")])) found.set(key, `${found.get(key) ?? ""}\n${texts[place]}`);
    });
  }
  return found;
}

/** Show the answers of both rows' runs to an item, seed by seed. */
async function showPair(one) {
  const page = taken.get("page"), task = page.columns[compareState.column].task;
  const sides = [];
  let asked = null;
  for (const [side, ids] of compareState.runs.entries()) {
    for (const run of ids.map((id) => page.runs.find((listed) => listed.id === id)).filter(Boolean)) {
      try {
        const answers = await loadAnswers(run, task);
        const places = answers.id.flatMap((id, place) => (id === one.id || id.startsWith(`${one.id}/`) ? [place] : []));
        asked ??= places.length ? questionView(answers, places[0], "") : null;
        sides.push([side, places.map((place) => itemView(answers, place, "", run.id))]);
      } catch (error) {
        sides.push([side, [el("p", { class: "none" }, error.message)]]);
      }
    }
  }
  const name = (row) => page.rows[row].names.filter(Boolean).join(", ");
  byId("compare-item").replaceChildren(
    el("h3", {}, one.id), asked ?? "",
    el("div", { class: "sides" }, [compareState.a, compareState.b].map((row, side) =>
      el("div", {}, el("h4", {}, `${"AB"[side]}: ${name(row)} (${plain(side ? one.b : one.a)})`), sides.filter(([of]) => of === side).flatMap(([, views]) => views)))));
}
