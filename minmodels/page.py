"""The page of the showcase: HTML without a script, beside its pictures, for screens of any width, light or dark."""

from collections.abc import Iterable, Sequence
from html import escape
from string import Template

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1d2430; --dim: #5b6675; --paper: #f6f7f9; --card: #fff; --line: #dfe3e9; --mark: #2563c9;
  --soft: #e8effb; --good: #1a7f4b; --bad: #c2352b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ef; --dim: #98a3b3; --paper: #10141a; --card: #191f28; --line: #2c3541;
  --mark: #7fb0ff; --soft: #1f2c42; --good: #58c98c; --bad: #ff8b80; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 62rem; margin: auto; }
h1 { font-size: clamp(1.5rem, 5vw, 2.2rem); line-height: 1.2; margin: 1rem 0 0.4rem; }
h2 { font-size: 1.3rem; margin: 0 0 0.3rem; }
h3 { font-size: 0.95rem; margin: 0 0 0.4rem; color: var(--dim); }
p { margin: 0.3rem 0 0.9rem; max-width: 46rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 0.8rem; padding: 1.2rem; margin: 1.2rem 0; }
.dim, figcaption, footer { color: var(--dim); font-size: 0.9rem; }
.tiles { display: grid; list-style: none; padding: 0; margin: 1.2rem 0; gap: 0.7rem;
  grid-template-columns: repeat(auto-fit, minmax(7.5rem, 1fr)); }
.tiles li { background: var(--card); border: 1px solid var(--line); border-radius: 0.8rem; padding: 0.7rem 0.9rem; }
.tiles b { display: block; font-size: 1.5rem; line-height: 1.3; color: var(--mark); }
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 1rem; align-items: start; }
.side > * { min-width: 0; }
figure { margin: 0 0 0.8rem; }
img { display: block; width: 100%; height: auto; background: #fff; border-radius: 0.5rem; border: 1px solid var(--line); }
pre, code { font: 0.85rem/1.5 ui-monospace, "Cascadia Code", Menlo, Consolas, monospace; }
pre { margin: 0; padding: 0.8rem; background: var(--paper); border-radius: 0.5rem; overflow-x: auto; }
pre.text { white-space: pre-wrap; overflow-wrap: anywhere; }
code { overflow-wrap: anywhere; }
details { margin-top: 0.8rem; }
summary { cursor: pointer; color: var(--dim); font-size: 0.9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--dim); font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.good { color: var(--good); } .bad { color: var(--bad); } .mark { color: var(--mark); font-weight: 600; }
.bar { display: block; height: 0.35rem; border-radius: 0.2rem; background: var(--mark); min-width: 2px; margin-top: 0.15rem; }
.out { border-style: dashed; }
</style>
</head>
<body>
<main>
<header>
<h1>$title</h1>
<p>$about</p>
<ul class="tiles">
$tiles
</ul>
</header>
$sections
<footer><p>$footer</p></footer>
</main>
</body>
</html>
""")


def page(title: str, about: str, tiles: Iterable[tuple[str, str]], sections: Iterable[str], footer: str) -> str:
    """tiles: (figure, what it is). All but the sections is text; they are what section() or left_out() return."""
    listed = "\n".join(f"<li><b>{escape(figure)}</b>{escape(name)}</li>" for figure, name in tiles)
    return PAGE.substitute(
        title=escape(title), about=escape(about), tiles=listed, sections="\n".join(sections), footer=escape(footer)
    )  # fmt: skip


def section(title: str, about: str, *body: str, command: str = "") -> str:
    """title, about and command are text, the body is HTML."""
    again = f"<details><summary>the command</summary><pre>{escape(command)}</pre></details>\n" if command else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n<p>{escape(about)}</p>\n" + "\n".join(body) + f"\n{again}</section>"


def left_out(title: str, reason: str) -> str:
    return f'<section class="out">\n<h2>{escape(title)}</h2>\n<p class="dim">Left out: {escape(reason)}</p>\n</section>'


def picture(src: str, alt: str, width: str = "100%") -> str:
    """src: relative to the page. alt: what is seen there, which stands under it too. width: the most that it takes, as CSS has it."""
    image = f'<img src="{escape(src)}" alt="{escape(alt)}" loading="lazy">'
    return f'<figure style="max-width: {width}">{image}<figcaption>{escape(alt)}</figcaption></figure>'


def text(title: str, content: str) -> str:
    return f'<div><h3>{escape(title)}</h3><pre class="text">{escape(content)}</pre></div>'


def side_by_side(*parts: str) -> str:
    return '<div class="side">\n' + "\n".join(parts) + "\n</div>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The cells are HTML, as escape() and mark() return it."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table></div>'


def mark(content: str, kind: str) -> str:
    """content is text. kind: good, bad or mark."""
    return f'<span class="{kind}">{escape(content)}</span>'


def bar(share: float) -> str:
    """share: 0 to 1 of the width of its cell."""
    return f'<span class="bar" style="width: {100 * min(max(share, 0), 1):.1f}%"></span>'
