// Links and keys. #/VIEW/… shows a view, #RUN/ITEM an answer, of a lower rank #RUN/ITEM?task=ranks/….

const VIEWS = ["table", "cell", "answers", "compare", "training"];

function showView(view) {
  for (const name of VIEWS) byId(`view-${name}`).hidden = name !== view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
}

async function route() {
  const parts = linkParts();
  const view = parts[0] === "" ? (VIEWS.includes(parts[1]) ? parts[1] : "table") : "answers";
  showView(view);
  say("");
  document.body.setAttribute("aria-busy", "true");
  try {
    if (view === "cell") await showCell(parts.slice(2));
    if (view === "compare") await showCompare(parts.slice(2));
    if (view === "answers") {
      const asked = new URLSearchParams(location.hash.split("?")[1] ?? "");
      await (parts[0] === "" ? showAnswers(parts[2], parts[3]) : showAnswers(parts[0], asked.get("task"), parts.slice(1).join("/") || null, Number(asked.get("sample") ?? 0)));
    }
  } catch (error) {
    say(error.message);
  }
  document.body.setAttribute("aria-busy", "false");
}

function keys(event) {
  const typing = event.target.closest?.("input[type=search], textarea, select");
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  if (event.key === "Escape" && typing) return event.target.blur();
  if (typing) return;
  const list = !byId("view-answers").hidden ? answersState.list : !byId("view-compare").hidden ? compareState.list : null;
  const step = { ArrowRight: 1, j: 1, ArrowLeft: -1, k: -1 }[event.key];
  if (step && list && !event.target.closest?.(".scroll, .bk-Canvas")) list.step(step);
  else if (event.key === "/") (byId("view-compare").hidden ? openSearch() : byId("compare-search")).focus();
  else if (event.key === "?") byId("help").showModal();
  else if (event.key === "t") location.hash = "/table";
  else return;
  event.preventDefault();
}

function openSearch() {
  if (byId("view-answers").hidden) {
    location.hash = "/answers";
    showView("answers"); // at once: what is hidden takes no focus, and the route comes later
  }
  return byId("answers-search");
}

function start() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const colour = () => document.documentElement.classList.toggle("dark", dark.matches); // DataTables' word for it
  dark.addEventListener("change", colour);
  colour();
  startTable();
  startCell();
  startAnswers();
  startCompare();
  startTraining();
  byId("help-button").addEventListener("click", () => byId("help").showModal());
  addEventListener("keydown", keys);
  addEventListener("hashchange", route);
  route();
}
addEventListener("DOMContentLoaded", start);
