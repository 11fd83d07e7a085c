"""The page of a review: one document with its own script and style, which loads nothing. Light, dark, and by keyboard.

Answers come as JSON in the page, and the script shows them as text alone (``textContent``), so that nothing a teacher or a user
wrote becomes markup.
"""

from __future__ import annotations

import json
from html import escape
from typing import Any

from edgedistill.report_style import STYLE

OWN = """
main { max-width: 1080px; padding-bottom: 120px; }
body:has(#change:not([hidden])) main { padding-bottom: 340px; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 14px; }
header h1 { margin: 0; }
#count { font-variant-numeric: tabular-nums; color: var(--soft); }
#told { margin: 2px 0 10px; color: var(--soft); font-size: .88rem; min-height: 1.4em; }
#map { display: flex; flex-wrap: wrap; gap: 3px; max-height: 74px; overflow-y: auto; padding: 3px; margin: 0 -3px 14px; }
#map button { width: 15px; height: 15px; padding: 0; border-radius: 4px; border: 1px solid var(--line); background: var(--card); }
#map .accept { background: var(--good); border-color: var(--good); }
#map .reject { background: var(--bad); border-color: var(--bad); }
#map .edit { background: var(--student); border-color: var(--student); }
#map [aria-current=true] { outline: 2px solid var(--ink); outline-offset: 1px; }
.meta { display: flex; flex-wrap: wrap; gap: 6px 8px; align-items: center; margin: 0 0 10px;
  font-size: .85rem; color: var(--soft); }
.meta b { color: var(--ink); overflow-wrap: anywhere; }
.tag { border: 1px solid var(--line); border-radius: 99px; padding: 0 9px; }
.pill { border-radius: 99px; padding: 0 10px; color: var(--page); font-weight: 600; margin-left: auto; }
.pill.accept { background: var(--good); }
.pill.reject { background: var(--bad); }
.pill.edit { background: var(--student); }
.turn { border-left: 3px solid var(--line); padding: 1px 0 1px 12px; margin: 0 0 10px; }
.turn.user { border-color: var(--student); }
.turn.assistant { border-color: var(--teacher); }
.who { font-size: .78rem; color: var(--soft); }
.said { white-space: pre-wrap; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 12px; margin-top: 16px; }
.box { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 8px 12px 10px; min-width: 0; }
.box.answer { border-color: var(--teacher); }
.box.edited { border-color: var(--student); }
.box .said { margin-top: 3px; }
.code { font: .88rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
details { margin: 0 0 8px; color: var(--soft); font-size: .9rem; }
details .said { margin-top: 4px; }
summary { cursor: pointer; }
footer { position: fixed; left: 0; right: 0; bottom: 0; background: var(--page); border-top: 1px solid var(--line); }
footer > div { max-width: 1080px; margin: 0 auto; padding: 10px 16px; }
.row { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; }
.row .space { flex: 1; }
footer button { font: inherit; font-weight: 600; padding: 6px 14px; border-radius: 8px; border: 1px solid var(--line);
  background: var(--card); color: var(--ink); cursor: pointer; }
footer button.accept { color: var(--good); border-color: var(--good); }
footer button.reject { color: var(--bad); border-color: var(--bad); }
footer button.edit { color: var(--student); border-color: var(--student); }
footer button:disabled { opacity: .5; cursor: default; }
kbd { font: .78rem ui-monospace, Menlo, Consolas, monospace; border: 1px solid currentColor; border-radius: 4px; padding: 0 4px;
  margin-left: 5px; opacity: .75; }
button:focus-visible, input:focus-visible, textarea:focus-visible { outline: 2px solid var(--student); outline-offset: 2px; }
textarea, input { width: 100%; font: inherit; color: var(--ink); background: var(--page); border: 1px solid var(--line);
  border-radius: 8px; padding: 8px 10px; margin-bottom: 8px; }
textarea { min-height: 9em; resize: vertical; font: .92rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
#message { color: var(--bad); font-size: .88rem; min-height: 0; margin: 0 0 6px; }
#message:empty { display: none; }
[hidden] { display: none !important; }
@media (max-width: 600px) { kbd { display: none; } footer button { padding: 8px 11px; } }
"""

BODY = """<main>
<header><h1>@title@</h1><span id="count" role="status"></span></header>
<p id="told"></p>
<nav id="map" aria-label="answers"></nav>
<article id="item" aria-live="polite"></article>
<noscript><p class="bad">This page needs its script: allow scripts on 127.0.0.1.</p></noscript>
</main>
<footer><div>
<p id="message" role="alert"></p>
<div id="why" hidden><input id="reason" maxlength="300" aria-label="why it is wrong" placeholder="why it is wrong (may stay empty)">
<div class="row"><button id="reject2" class="reject">Reject<kbd>Enter</kbd></button>
<button class="cancel">Cancel<kbd>Esc</kbd></button></div></div>
<div id="change" hidden><textarea id="text" spellcheck="false" aria-label="the answer as it should be"></textarea>
<div class="row"><button id="save" class="edit">Save<kbd>Ctrl Enter</kbd></button>
<button class="cancel">Cancel<kbd>Esc</kbd></button></div></div>
<div id="bar" class="row"><button id="accept" class="accept">Accept<kbd>a</kbd></button>
<button id="reject" class="reject">Reject<kbd>r</kbd></button><button id="edit" class="edit">Edit<kbd>e</kbd></button>
<span class="space"></span><button id="back">Back<kbd>k</kbd></button><button id="next">Next<kbd>j</kbd></button>
<button id="end">Finish</button></div>
</div></footer>
"""

SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const get = (id) => document.getElementById(id);
let at = Math.max(0, data.items.findIndex((one) => !one.verdict)), sure = false, busy = false, over = false;

function make(tag, cls, ...children) {
  const node = document.createElement(tag);
  if (cls) node.className = cls;
  for (const child of children) node.append(child);  // strings become text
  return node;
}
const isCode = (text) => /^\\s*[\\[{]/.test(text);
const said = (text) => make("div", "said" + (isCode(text) ? " code" : ""), text);
const pretty = (value) => JSON.stringify(value, null, 1);
function call(one) {
  const { name, arguments: given } = one.function || one;
  return `${name}(${typeof given === "string" ? given : JSON.stringify(given ?? {})})`;
}
function folded(title, text, open) {
  const node = make("details", "", make("summary", "", title), said(text));
  node.open = open;
  return node;
}
function turn(message) {
  const content = typeof message.content === "string" ? message.content : message.content ? pretty(message.content) : "";
  const node = make("div", "turn " + message.role, make("div", "who", message.role + (message.name ? " " + message.name : "")));
  if (content) node.append(said(content));
  if (message.tool_calls) node.append(make("div", "said code", message.tool_calls.map(call).join("\\n")));
  return node;
}
function box(title, text, cls, thinking) {
  const node = make("div", "box " + cls, make("div", "who", title));
  if (thinking) node.append(folded("thinking", thinking, true));
  node.append(said(text));
  return node;
}
const words = { accept: "accepted", reject: "rejected", edit: "edited" };

function show() {
  const one = data.items[at], verdict = one.verdict, item = get("item");
  const meta = make("div", "meta", make("b", "", one.id), ...one.tags.map((tag) => make("span", "tag", tag)));
  if (verdict) {
    meta.append(make("span", "pill " + verdict.verdict, words[verdict.verdict]));
    meta.append([verdict.reason, verdict.by && "by " + verdict.by].filter(Boolean).join(", "));
  }
  const pair = make("div", "pair", box("answer", one.answer, "answer", one.thinking));
  if (verdict && verdict.verdict === "edit") pair.append(box("as edited", verdict.text, "edited"));
  if (one.reference !== null) {
    const same = one.reference.trim() === one.answer.trim();
    pair.append(box(same ? "reference (the same)" : "reference", one.reference, ""));
  }
  item.replaceChildren(meta);
  if (one.tools.length) item.append(folded(`tools: ${one.tools.length}`, pretty(one.tools), false));
  item.append(...one.messages.map(turn), pair);
  get("count").textContent = `answer ${at + 1}; ${data.done} of ${data.items.length} judged`;
  get("told").textContent = data.told;
  document.title = `${data.done} of ${data.items.length}: review`;
  [...get("map").children].forEach((cell, n) => {
    cell.className = data.items[n].verdict ? data.items[n].verdict.verdict : "";
    cell.setAttribute("aria-current", n === at);
    if (n === at) cell.scrollIntoView({ block: "nearest" });
  });
  get("back").disabled = at === 0;
  get("next").disabled = at === data.items.length - 1;
}
function panel(name) {
  sure = false;
  get("message").textContent = "";
  get("save").firstChild.textContent = "Save";
  for (const id of ["bar", "why", "change"]) get(id).hidden = id !== name;
  if (name === "why") { get("reason").value = ""; get("reason").focus(); }
  if (name === "change") {
    const one = data.items[at];
    get("text").value = one.verdict && one.verdict.text ? one.verdict.text : one.text;
    get("text").focus();
  }
  if (name === "bar" && document.activeElement) document.activeElement.blur();
}
function go(to) {
  if (busy) return;
  at = Math.min(Math.max(to, 0), data.items.length - 1);
  panel("bar");
  show();
  window.scrollTo(0, 0);
}
async function post(name, body) {
  const answer = await fetch(`${data.base}/${name}`, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}
async function judge(verdict, more) {
  if (busy || over) return;
  busy = true;
  const one = data.items[at];
  try {
    const found = await post("verdict", { key: one.key, verdict, ...more });
    if (!found.saved) {
      get("message").textContent = found.warning;
      get("save").firstChild.textContent = "Save anyway";
      sure = true;
      return;
    }
    one.verdict = found.verdict;
    data.done = found.done;
    data.told = found.told;
    busy = false;
    const left = data.items.flatMap((other, n) => (other.verdict ? [] : [n]));
    go(left.find((n) => n > at) ?? left[0] ?? at + 1);
    if (!left.length) get("message").textContent = "All are judged. Finish ends; the terminal shows the summary.";
  } catch (error) {
    const gone = error instanceof TypeError;  // what fetch throws where nobody listens
    get("message").textContent = gone ? "edgedistill review has ended: start it again to go on." : error.message;
  } finally {
    busy = false;
  }
}
async function finish() {
  try { await post("end", {}); } catch { /* it has ended */ }
  over = true;
  get("message").textContent = "Ended: the terminal shows the summary, and this page may be closed.";
  for (const button of document.querySelectorAll("footer button")) button.disabled = true;
}
get("map").append(...data.items.map((one, n) => {
  const cell = make("button");
  cell.title = one.id;
  cell.setAttribute("aria-label", `answer ${n + 1}`);
  cell.addEventListener("click", () => go(n));
  return cell;
}));
const save = () => judge("edit", { text: get("text").value, sure });
const reject = () => judge("reject", { reason: get("reason").value });
const actions = { accept: () => judge("accept", {}), reject: () => panel("why"), edit: () => panel("change"),
  back: () => go(at - 1), next: () => go(at + 1), end: finish, save, reject2: reject };
for (const [id, action] of Object.entries(actions)) get(id).addEventListener("click", action);
for (const button of document.querySelectorAll(".cancel")) button.addEventListener("click", () => panel("bar"));
get("text").addEventListener("input", () => { sure = false; get("save").firstChild.textContent = "Save"; });
const keys = { a: actions.accept, r: actions.reject, e: actions.edit, j: actions.next, k: actions.back,
  ArrowRight: actions.next, ArrowLeft: actions.back };
document.addEventListener("keydown", (event) => {
  if (over || event.isComposing) return;
  if (event.key === "Escape") return panel("bar");
  if (event.target.id === "reason" && event.key === "Enter") return reject();
  if (event.target.id === "text" && event.key === "Enter" && (event.ctrlKey || event.metaKey)) return save();
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|TEXTAREA)$/.test(event.target.tagName)) return;
  const action = keys[event.key];
  if (action && !get("bar").hidden) { event.preventDefault(); action(); }
});
panel("bar");
show();
"""


def page(name: str, data: dict[str, Any], nonce: str) -> str:
    """Return the page of a review: ``data`` is what the script shows, ``nonce`` what lets its script and style run."""
    title = escape(f"{name}: review")
    # "<" would end the element that the text stands in; in JSON it has another spelling.
    text = json.dumps(data).replace("<", "\\u003c")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f'<style nonce="{nonce}">{STYLE}{OWN}</style></head>\n<body>{BODY.replace("@title@", title)}'
        f'<script type="application/json" id="data">{text}</script>\n'
        f'<script nonce="{nonce}">{SCRIPT}</script></body></html>\n'
    )
