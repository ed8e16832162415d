// The answers of a run to a task: the list, its filters and search, one item at a time.

const SIGNS = { right: "✓ right", partly: "◐ partly", wrong: "✗ wrong", invalid: "∅ invalid", cut: "✂ cut", ungraded: "– not graded", rated: "rated" };
const NOTHING = { run: null, task: null, answers: null, at: null, shown: [], words: "" };
let answersState = { ...NOTHING };

/** Return the answers of a run to a task: arrays by place. Throws where they are not in the page. */
async function loadAnswers(run, task) {
  const files = run.tasks[task];
  if (!files?.answers) throw new Error(`${run.id} has no answers to ${task} in this page: ${(files?.missing ?? ["there are none"]).join("; ")}`);
  const [answers, items] = await Promise.all([need(files.answers), need(files.items)]);
  const found = { ...answers, ...items, length: items.id.length };
  found.place ??= new Map(items.id.map((id, place) => [`${id} ${items.sample[place]}`, place]));
  return found;
}

const promptOf = (answers, place) => (answers.prompt ? answers.prompt[place] : answers.frame[0] + answers.question[place] + answers.frame[1]);

/** Return the task that a link to an item means where it names none: a lower rank's answers have the same ids. */
function taskOf(run, id) {
  const names = Object.keys(run.tasks).filter((name) => run.tasks[name].prefix === id.split("/")[0]);
  return names.find((name) => !name.startsWith("ranks/")) ?? names[0];
}

/** Return the link to an answer of the task that is shown. */
function linkTo(place) {
  const { answers, run, task } = answersState, id = answers.id[place];
  return itemLink(run.id, id, answers.sample[place], task === taskOf(run, id) ? null : task);
}

/** Return the verdict on an answer by a metric; a metric that is no share of right and wrong only "rates". */
function verdictOf(answers, place, metric) {
  if (!answers.is_graded[place]) return "ungraded";
  const value = answers.metrics?.[place]?.[metric];
  if (answers.invalid[place]) return "invalid";
  if (value == null) return "ungraded";
  if (metric.startsWith("rating") || metric === "error") return "rated";
  const share = answers.lower?.includes(metric) ? 1 - value : value;
  return share >= 1 ? "right" : share > 0 ? "partly" : "wrong";
}
const isCut = (answers, place) => answers.finish?.[place] === "length";

function startAnswers() {
  const page = taken.get("page");
  fillSelect(byId("answers-run"), page.runs.map((run) => [run.id, run.id]));
  fillSelect(byId("answers-other"), [["", "no other run"], ...page.runs.map((run) => [run.id, run.id])]);
  byId("answers-run").addEventListener("change", () => go(byId("answers-run").value, answersState.task));
  byId("answers-task").addEventListener("change", () => go(byId("answers-run").value, byId("answers-task").value));
  for (const id of ["metric", "verdict", "group"]) byId(`answers-${id}`).addEventListener("change", filterAnswers);
  byId("answers-search").addEventListener("input", filterAnswers);
  byId("answers-other").addEventListener("change", () => showItem(answersState.at));
  answersState.list = itemList(byId("answers-list"), {
    headings: ["item", "verdict", "question", "extracted", "gold"],
    label: "Answers",
    count: () => answersState.shown.length,
    cell: (row, column) => answerCell(answersState.shown[row], column),
    order: (column) => answersState.shown.map((place) => answerKey(place, column)),
    chosen: (row) => { location.hash = linkTo(answersState.shown[row]).slice(1); },
  });
  function go(run, task) { location.hash = `/answers/${encodeURIComponent(run)}/${encodeURIComponent(task ?? "")}`; }
}

function answerCell(place, column) {
  const { answers } = answersState, metric = byId("answers-metric").value;
  if (column === 0) {
    return el("a", { href: linkTo(place) }, answers.id[place] + (answers.sample[place] ? ` (${answers.sample[place]})` : ""));
  }
  if (column === 1) {
    const verdict = verdictOf(answers, place, metric), value = answers.metrics?.[place]?.[metric];
    const text = verdict === "rated" ? plain(value) : SIGNS[verdict];
    return el("span", { class: `verdict-${verdict}` }, text + (isCut(answers, place) ? " ✂ cut" : ""));
  }
  if (column === 2) return snippet(answers.question[place], 70);
  if (column === 3) return snippet(extractedOf(place), 30);
  return snippet(answers.gold[place], 30);
}
const extractedOf = (place) => {
  const { answers } = answersState, found = answers.extracted?.[place];
  return found ? found[byId("answers-metric").value] ?? found.outcome ?? found.ratings ?? Object.values(found)[0] : answers.completion?.[place];
};
function answerKey(place, column) {
  const { answers } = answersState;
  if (column === 0) return Number(answers.id[place].split("/").find((part) => /^\d+$/.test(part)) ?? place);
  if (column === 1) return answers.metrics?.[place]?.[byId("answers-metric").value] ?? -1;
  return (column === 2 ? answers.question[place] : column === 3 ? extractedOf(place) : answers.gold[place]) ?? "";
}

/** Return the lower-case text of each answer that the search looks through. */
function searchedTexts(answers) {
  answers.searched ??= answers.id.map((id, place) =>
    [id, answers.question[place], answers.completion?.[place], answers.gold[place], ...Object.values(answers.extracted?.[place] ?? {})].filter(Boolean).join("\n").toLowerCase());
  return answers.searched;
}

function filterAnswers() {
  const { answers } = answersState;
  if (!answers) return;
  const metric = byId("answers-metric").value, verdict = byId("answers-verdict").value, group = byId("answers-group").value;
  const words = byId("answers-search").value.toLowerCase();
  const texts = words && searchedTexts(answers);
  answersState.words = words;
  answersState.shown = [];
  for (let place = 0; place < answers.length; place++) {
    if (verdict && (verdict === "cut" ? !isCut(answers, place) : verdictOf(answers, place, metric) !== verdict)) continue;
    if (group && !Object.entries(answers.groups[place]).some(([key, value]) => `${key}: ${value}` === group)) continue;
    if (words && !texts[place].includes(words)) continue;
    answersState.shown.push(place);
  }
  byId("answers-count").textContent = `${answersState.shown.length} of ${answers.length} answers`;
  answersState.list.refresh();
}

/** Show the answers of a run to a task, and of them one; run and task by name. */
async function showAnswers(runId, task, id, sample = 0) {
  const page = taken.get("page");
  const run = page.runs.find((one) => one.id === runId) ?? page.runs.find((one) => Object.values(one.tasks).some((of) => of.n));
  if (runId && run?.id !== runId) say(`No run ${runId} in this page.`);
  if (run?.id !== runId) id = undefined;
  if (!run) { byId("answers-count").textContent = "No run of this page has answers at hand."; return; }
  const names = Object.keys(run.tasks);
  const chosen = names.includes(task) ? task : id && taskOf(run, id);
  const wanted = names.includes(chosen) ? chosen : names.find((name) => run.tasks[name].n) ?? names[0];
  byId("answers-run").value = run.id;
  fillSelect(byId("answers-task"), names.map((name) => [name, `${name} (${run.tasks[name].n})`]), wanted);
  if (answersState.run !== run || answersState.task !== wanted) {
    try {
      const answers = await loadAnswers(run, wanted);
      Object.assign(answersState, NOTHING, { run, task: wanted, answers });
    } catch (error) {
      Object.assign(answersState, NOTHING);
      byId("answers-count").textContent = error.message;
      byId("answers-item").replaceChildren();
      answersState.list.refresh();
      return;
    }
    const { answers } = answersState;
    fillSelect(byId("answers-metric"), (answers.metric_names.length ? answers.metric_names : ["none"]).map((name) => [name, name]), byId("answers-metric").value);
    const groups = [...new Set(answers.groups.flatMap((of) => Object.entries(of).map(([key, value]) => `${key}: ${value}`)))].sort();
    fillSelect(byId("answers-group"), [["", "all"], ...groups.map((group) => [group, group])]);
    byId("answers-item").replaceChildren();
    filterAnswers();
  }
  const { answers } = answersState;
  const place = id ? answers.place.get(`${id} ${sample}`) : answersState.shown[0];
  if (id && place === undefined) say(`${run.id} has no answer to ${id} in this page.`);
  if (place !== undefined) await showItem(place);
}

async function showItem(place) {
  if (place == null) return;
  const { answers, run, task, words } = answersState;
  answersState.at = place;
  answersState.list.mark(answersState.shown.indexOf(place));
  const other = taken.get("page").runs.find((one) => one.id === byId("answers-other").value);
  const sides = [itemView(answers, place, words, run.id)];
  if (other) {
    try {
      const theirs = await loadAnswers(other, task);
      const found = theirs.place.get(`${answers.id[place]} ${answers.sample[place]}`);
      sides.push(found === undefined ? el("p", {}, `${other.id} did not answer this item.`) : itemView(theirs, found, words, other.id));
    } catch (error) {
      sides.push(el("p", { class: "none" }, error.message));
    }
  }
  byId("answers-item").replaceChildren(
    el("h3", {}, el("a", { href: linkTo(place) }, answers.id[place])),
    questionView(answers, place, words),
    el("div", { class: sides.length > 1 ? "sides" : "" }, sides));
  requestAnimationFrame(() => setTimeout(() => performance.mark("answer shown"))); // for scripts/bench_page.py
}

/** What was asked: question, gold and groups, and the whole prompt, folded. */
function questionView(answers, place, words) {
  const prompt = promptOf(answers, place);
  const groups = Object.entries(answers.groups[place]).map(([key, value]) => `${key}: ${value}`).join(", ");
  return el("div", {},
    groups ? el("p", {}, groups) : null,
    el("h4", {}, answers.kind === "classes" ? "Text" : "Question"), textBlock(answers.question[place], { words, name: "question" }),
    answers.gold[place] == null ? null : [el("h4", {}, answers.kind === "classes" ? "Label" : "Gold"), textBlock(answers.gold[place], { words, name: "gold" })],
    prompt == null || answers.kind === "classes" ? null : el("details", {}, el("summary", {}, "The prompt as it was"), textBlock(prompt, { name: "prompt" })));
}

/** One run's answer to an item: of MT-Bench's second turn the first one before it. */
function itemView(answers, place, words, title) {
  const id = answers.id[place], first = id.endsWith("/turn2") ? answers.place.get(`${id.replace(/2$/, "1")} ${answers.sample[place]}`) : undefined;
  return el("div", { class: "side" },
    el("p", { class: "of-run" }, title),
    first === undefined ? null : [el("h4", {}, "First question"), textBlock(answers.question[first], { words }), answerView(answers, first, words, "First answer"), el("h4", {}, "Second question"), textBlock(answers.question[place], { words })],
    answerView(answers, place, words, first === undefined ? (answers.kind === "classes" ? "Prediction" : "Answer") : "Second answer"));
}

function answerView(answers, place, words, heading) {
  const extracted = { ...answers.extracted?.[place] }, program = extracted.program;
  delete extracted.program;
  const facts = [
    ...Object.entries(answers.metrics?.[place] ?? {}).map(([name, value]) => {
      const verdict = verdictOf(answers, place, name);
      return [name, el("span", { class: `verdict-${verdict}` }, verdict === "rated" ? plain(value) : `${SIGNS[verdict]} (${plain(value)})`)];
    }),
    ...Object.entries(extracted).map(([name, text]) => [`extracted, ${name}`.replace("extracted, outcome", "sandbox").replace("extracted, strict_outcome", "sandbox, as it stands"), text == null ? "nothing" : textBlock(text, { words })]),
    ...(answers.finish?.[place] ? [["ended by", answers.finish[place] === "length" ? "✂ length: cut" : answers.finish[place]]] : []),
    ...(answers.invalid[place] ? [["invalid", "no answer could be read"]] : []),
    ...(answers.timeout[place] ? [["time limit", "the grader's was hit"]] : []),
    ...(answers.error?.[place] ? [["grader's error", textBlock(answers.error[place])]] : []),
    ...Object.entries(answers.probabilities?.[place] ?? {}).map(([label, p]) => [`p(${label})`, el("span", {}, el("meter", { min: 0, max: 1, value: p, "aria-label": `p(${label})` }), ` ${plain(p)}`)]),
  ];
  return [
    el("h4", {}, heading), textBlock(answers.completion?.[place] ?? null, { words, name: "answer" }),
    program == null ? (answers.kind === "code" ? el("p", { class: "none" }, "no program found in it") : null) : [el("h4", {}, "Program that was run"), textBlock(program, { name: "program" })],
    el("dl", { class: "facts" }, facts.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])),
    (answers.judgements?.[place] ?? []).map((one) => el("div", { class: "judgement" },
      el("h4", {}, `Judgement ${one.index ?? ""} by ${one.judge ?? "?"} ${one.judge_version ?? ""}`), textBlock(one.judgement, { words, name: "judgement" }))),
  ].flat();
}
