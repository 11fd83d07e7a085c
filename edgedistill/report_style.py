"""The style sheet of the pages: light, dark and print, readable on a phone."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6575; --line: #dde2ea; --page: #ffffff;
  --card: #f6f8fb; --teacher: #6b3fa0; --baseline: #7a8494; --student: #0b6bcb; --artifact: #c2410c;
  --good: #137a3f; --bad: #b91c1c; --wait: #8a5a00; --heat: 185, 28, 28; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf1; --soft: #9aa5b6; --line: #313a49; --page: #12161d; --card: #1a202a; --teacher: #c4a3f0;
    --baseline: #98a2b3; --student: #6cb2ff; --artifact: #ff9d5c; --good: #5fd28f; --bad: #ff8585; --wait: #f0c060;
    --heat: 255, 90, 90; }
}
* { box-sizing: border-box; }
html { font-size: 15px; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1200px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 36px 0 6px; padding-top: 10px; border-top: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 18px 0 4px; }
p { margin: 4px 0 10px; max-width: 76ch; overflow-wrap: anywhere; }
.lede, .note, li { color: var(--soft); }
.note, li { font-size: .85rem; overflow-wrap: anywhere; }
ul { padding-left: 1.2em; margin: 4px 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 10px; margin: 16px 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px;
  break-inside: avoid; }
.card b { display: block; overflow-wrap: anywhere; }
.card dl { display: grid; grid-template-columns: auto 1fr; gap: 1px 10px; margin: 6px 0 0; }
.card dt { color: var(--soft); }
.card dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.wait { color: var(--wait); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 18px; }
figure { margin: 0; break-inside: avoid; max-width: 560px; }
figcaption { font-weight: 600; font-size: .9rem; margin-bottom: 2px; }
svg { display: block; width: 100%; height: auto; overflow: visible;
  font: 11.5px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
svg text { fill: var(--soft); }
svg .label { fill: var(--ink); font-size: 11.5px; paint-order: stroke; stroke: var(--page); stroke-width: 3px; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .lead { stroke: var(--soft); stroke-width: .7; }
svg .span { fill: var(--student); }
svg .bar { stroke-width: 1.6; opacity: .65; }
svg .curve { fill: none; stroke-width: 2; }
svg .raw { fill: none; stroke-width: 1; opacity: .22; }
.teacher { --of: var(--teacher); }
.baseline { --of: var(--baseline); }
.student { --of: var(--student); }
.artifact { --of: var(--artifact); }
.loss { --of: var(--student); }
.kd { --of: var(--artifact); }
.ce { --of: var(--teacher); }
.features { --of: var(--baseline); }
.distances { --of: var(--good); }
.angles { --of: var(--wait); }
svg .mark { fill: var(--of); stroke: var(--page); }
svg .bar, svg .curve, svg .raw { stroke: var(--of); }
.found dt { font-weight: 600; margin-top: 10px; }
.found dd { margin: 0; max-width: 90ch; overflow-wrap: anywhere; }
.found small { display: block; font-size: .88rem; color: var(--soft); }
code { font: .82rem ui-monospace, Menlo, Consolas, monospace; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: .85rem; color: var(--soft); margin: 6px 0; }
.legend svg { width: 16px; height: 16px; display: inline-block; vertical-align: -3px; margin-right: 3px; }
.scroll { overflow-x: auto; margin: 4px -16px 6px; padding: 0 16px; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 11px 4px 0; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
td.r, th.r { text-align: right; white-space: nowrap; }
td:first-child { font-weight: 600; min-width: 9em; }
tr.rule td { border-top: 2px solid var(--soft); }
td.w { min-width: 13em; }
td.n { white-space: nowrap; }
td small, th small { display: block; color: var(--soft); font-size: .78rem; font-weight: 400; white-space: nowrap; }
.heat td { padding: 3px 8px; text-align: right; }
.heat td:first-child, .heat th:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
.heat th { padding: 3px 8px; text-align: right; min-width: 5.4em; }
@media print {
  :root { --ink: #000; --soft: #444; --line: #ccc; --page: #fff; --card: #fff; --heat: 185, 28, 28; }
  main { max-width: none; padding: 0; }
  html { font-size: 9.5px; }
  .scroll { overflow: visible; }
  th, td { padding-right: 6px; }
  td:first-child { min-width: 0; }
  td.w { min-width: 0; }
  .heat td, .heat th { padding: 2px 4px; min-width: 0; }
  .plots { grid-template-columns: 1fr 1fr; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  h2 { break-after: avoid; }
  tr { break-inside: avoid; }
}
"""
