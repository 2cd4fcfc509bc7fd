"""A self-contained page: one file, no script, light and dark, for narrow and wide screens."""

from collections.abc import Iterable, Sequence
from html import escape

COLOURS = tuple(f"k{number}" for number in range(1, 9))  # of series, as classes

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --soft: #5b626c; --line: #d9dce1; --panel: #f6f7f9;
  --a: #2a6fbb; --b: #c2571a; --good: #23763a; --bad: #b3261e; --warn: #8a5a00; --warn-paper: #fff6e0;
  --k3: #23763a; --k4: #8e44ad; --k5: #0e8a8a; --k6: #b3261e; --k7: #7a6a00; --k8: #555c66;
  --trained: #bfe8c5; --weighted: #f3e2a0; --shade: rgb(0 0 0 / .28); }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #15181c; --soft: #9aa3ae; --line: #363c44;
  --panel: #1e2228; --a: #6fb1f5; --b: #f0935a; --good: #6fce88; --bad: #ff8a80; --warn: #f0c060; --warn-paper: #2f2710;
  --k3: #6fce88; --k4: #c79be6; --k5: #5fcfcf; --k6: #ff8a80; --k7: #d8c653; --k8: #b5bcc6;
  --trained: #1d5a2a; --weighted: #6b5a10; --shade: rgb(255 255 255 / .3); } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem;
  margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .8rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h2 { overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; } a { color: var(--a); }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
caption { text-align: left; padding-bottom: .3rem; }
/* A shadow at the edge says that there is more: the covers move with the table, the shadows stay. */
.scroll { overflow-x: auto; max-width: 100%; background:
  linear-gradient(to right, var(--paper) 40%, transparent) 0 0 / 3rem 100% no-repeat local,
  linear-gradient(to left, var(--paper) 40%, transparent) 100% 0 / 3rem 100% no-repeat local,
  linear-gradient(to right, var(--shade), transparent) 0 0 / 1.1rem 100% no-repeat scroll,
  linear-gradient(to left, var(--shade), transparent) 100% 0 / 1.1rem 100% no-repeat scroll; }
.charts + .scroll, .scroll + figure { margin-top: 1rem; } td.v { white-space: nowrap; }
table { border-collapse: collapse; font-size: .92rem; }
td, th { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; } .off { color: var(--warn); }
.warning { color: var(--warn); background: var(--warn-paper); border-left: 4px solid var(--warn); padding: .5rem .8rem;
  border-radius: 4px; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .7rem; margin: 1.2rem 0; }
.tiles div { background: var(--panel); border-radius: 8px; padding: .7rem .9rem; overflow-wrap: anywhere; }
.tiles b { display: block; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.3; }
.tiles span { color: var(--soft); font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.2rem; }
figure { margin: 0; background: var(--panel); border-radius: 8px; padding: .8rem; min-width: 0; max-width: 44rem; }
figure svg { display: block; width: 100%; height: auto; } figcaption { margin-bottom: .3rem; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; } svg .grid { stroke: var(--line); stroke-width: 1; }
svg .bar { fill: var(--a); } svg .zero { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; }
svg .line, svg .whisker { stroke: var(--own); } svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .dot { stroke: none; fill: var(--own); } svg .whisker { stroke-width: 2; }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin: 0 .3rem 0 .8rem; vertical-align: -1px;
  background: var(--own); }
.named { display: inline-block; }
.k1 { --own: var(--a); } .k2 { --own: var(--b); } .k3 { --own: var(--k3); } .k4 { --own: var(--k4); }
.k5 { --own: var(--k5); } .k6 { --own: var(--k6); } .k7 { --own: var(--k7); } .k8 { --own: var(--k8); }
.keys { position: sticky; top: 0; z-index: 1; background: var(--paper); padding: .3rem 0; overflow-wrap: anywhere; }
pre, .text { font: .85rem/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0; }
pre { background: var(--panel); border-radius: 8px; padding: .8rem; max-height: 40rem; overflow: auto; }
details { margin: .5rem 0; } summary { cursor: pointer; padding: .3rem 0; color: var(--a); }
.sample { border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; margin: .8rem 0; }
.sides { display: grid; margin-top: .6rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: .3rem 1.2rem; }
.sample .text { max-height: 15rem; overflow: auto; }
.sides > div { min-width: 0; } .sample b { font-size: .85rem; color: var(--soft); }
.document { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  border: 1px solid var(--line); border-radius: 6px; padding: .8rem; max-height: 32rem; overflow: auto; }
.document span { border-right: 1px solid var(--line); }
.document span:focus { outline: 2px solid var(--a); opacity: 1; }
.document span:focus::after { content: attr(title); position: fixed; left: 0; right: 0; bottom: 0; z-index: 1;
  padding: .7rem 1rem; background: var(--ink); color: var(--paper); font: 15px/1.4 system-ui, sans-serif; white-space: normal; }
.t { background: var(--trained); } .w { background: var(--weighted); } .c { opacity: .6; }
.p, .document .p { border-left: 4px solid var(--b); }
@media (max-width: 40rem) { svg text { font-size: 17px; } }
@media print { details > * { display: block; } body { max-width: none; } }
"""


def page(title: str, body: Iterable[str]) -> str:
    """Return a whole HTML file; `title` is text, `body` is HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "", numbers: bool = True) -> str:
    """Return the HTML of a table of texts. The first column names the row; the others are numbers (`numbers`) or texts. It
    scrolls on a narrow screen."""
    kind = ' class="n"' if numbers else ""

    def line(cells: Sequence[str]) -> str:
        first, *rest = cells
        return f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td{kind}>{escape(cell)}</td>" for cell in rest)}</tr>'

    top = "".join(f'<th scope="col"{kind if n else ""}>{escape(name)}</th>' for n, name in enumerate(head))
    named = f"<caption>{escape(caption)}</caption>" if caption else ""
    heading = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f'<div class="scroll" tabindex="0"><table>{named}{heading}<tbody>{"".join(map(line, rows))}</tbody></table></div>'


def details(summary: str, *inner: str) -> str:
    """Return HTML that shows when the summary, a text, is clicked."""
    return f"<details><summary>{escape(summary)}</summary>{''.join(inner)}</details>"


def text(value: str) -> str:
    """Return the HTML of a text as it is, with its line breaks."""
    return f'<div class="text">{escape(value)}</div>'


def section(title: str, parts: Iterable[str]) -> list[str]:
    """Return the HTML of a section with a heading; empty without parts."""
    parts = [part for part in parts if part]
    return [f"<section><h2>{escape(title)}</h2>", *parts, "</section>"] if parts else []


def key(name: str, colour: str) -> str:
    """Return the HTML of a coloured square and the name of its series."""
    return f'<span class="named"><span class="key {colour}"></span>{escape(name)}</span>'


def keys(names: Sequence[str]) -> str:
    """Return the HTML of a key of all series, which stays in sight."""
    return f'<p class="keys">{"".join(map(key, names, COLOURS))}</p>'
