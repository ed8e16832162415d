// Texts of runs, shown as they are: what cannot be seen by its name, long ones folded, searched words marked.

const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;
const FOLD = 1500, STEP = 100000; // characters shown at first, and added at a time

/** Append `text` to `holder`: characters that change or hide others (controls, right-to-left marks) by their code point. */
function appendText(holder, text, words = "") {
  const pieces = words ? text.split(new RegExp(`(${words.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")})`, "giu")) : [text];
  for (const [number, piece] of pieces.entries()) {
    const target = number % 2 ? el("mark") : holder;
    let from = 0;
    for (const found of piece.matchAll(UNSEEN)) {
      if (found[0] === "\n" || found[0] === "\t") continue;
      if (found.index > from) target.append(piece.slice(from, found.index));
      const code = found[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      target.append(el("span", { class: "unseen" }, `⟨U+${code}⟩`));
      from = found.index + found[0].length;
    }
    if (from < piece.length) target.append(piece.slice(from));
    if (number % 2) holder.append(target);
  }
}

/** Return a block that shows a text; null: "not at hand". A long one is folded, opened where a searched word is behind. */
function textBlock(text, { words = "", name = "text" } = {}) {
  if (text == null) return el("p", { class: "none" }, "not at hand");
  if (text === "") return el("p", { class: "none" }, "empty");
  const body = el("pre", { class: "text", dir: "auto" });
  let end = Math.min(FOLD, text.length);
  if (words && text.slice(0, end).toLowerCase().includes(words.toLowerCase()) === false && text.length <= STEP) end = text.length;
  if (text.length - end < 200) end = text.length;
  appendText(body, text.slice(0, end), words);
  if (end === text.length) return body;
  const more = el("button", { type: "button" }, "");
  const label = () => { more.textContent = `show more of this ${name} (${end.toLocaleString("en")} of ${text.length.toLocaleString("en")} characters)`; };
  more.addEventListener("click", () => {
    const next = Math.min(end + STEP, text.length);
    appendText(body, text.slice(end, next), words);
    end = next;
    if (end === text.length) more.remove(); else label();
  });
  label();
  return el("div", {}, body, more);
}

/** Return the first characters of a text on one line. */
function snippet(text, length = 90) {
  const holder = el("span", { dir: "auto" });
  const line = (text ?? "").slice(0, 4 * length).replace(/\s+/g, " ").trim();
  appendText(holder, line.length > length ? `${line.slice(0, length)} …` : line);
  return holder;
}

/** A button that copies a text, and says so. */
function copyButton(text, what) {
  return el("button", { type: "button", onclick: async (event) => {
    const button = event.currentTarget;
    try {
      await navigator.clipboard.writeText(text);
    } catch { // file:// may have no clipboard
      const area = el("textarea", { "aria-hidden": "true", class: "away" });
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = "copied";
    say(`${what} is copied`);
  } }, "copy");
}
