"""What the page of a report is laid out with: its style, cards and tables."""

import html
from collections.abc import Mapping

CSS = """
:root { --paper:#f6f7f9; --card:#fff; --ink:#1f2733; --soft:#5b6577; --grid:#d8dde5;
        --good:#1c7a6f; --bad:#b3403a }
@media (prefers-color-scheme: dark) {
  :root { --paper:#14181f; --card:#1c222b; --ink:#e4e8ee; --soft:#a3adbc; --grid:#39424f;
          --good:#4fc3b3; --bad:#ef8a80 }
}
* { box-sizing:border-box }
body { margin:0; background:var(--paper); color:var(--ink); overflow-wrap:anywhere;
       font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif }
main { max-width:1120px; margin:0 auto; padding:40px 24px 64px }
h1 { font-size:28px; line-height:1.2; margin:0; letter-spacing:-.01em } h2 { font-size:16px; margin:0 0 4px }
header p, .note { color:var(--soft); margin:4px 0 0 } .note { font-size:13px; margin:0 0 10px }
.tiles { display:grid; gap:14px; grid-template-columns:repeat(auto-fit,minmax(172px,1fr)); margin:18px 0 }
.tile, .card { background:var(--card); border:1px solid var(--grid); border-radius:12px; min-width:0 }
.tile { padding:13px 13px } .tile b { display:block; font-size:19px; font-weight:600; white-space:nowrap }
.tile span { color:var(--soft); font-size:13px }
.grid { display:grid; gap:18px; grid-auto-flow:dense;
  grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr)) }
.grid > * { min-width:0 } .row { grid-column:1/-1 }
.card { padding:18px 20px }
.card svg { width:100%; max-width:480px; height:auto; display:block; margin:0 auto }
.card svg text { font-family:system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif !important }
.wide { margin-top:18px } table { border-collapse:collapse; width:100%; font-size:14px }
td, th { padding:5px 12px 5px 0; vertical-align:top; border-top:1px solid var(--grid); text-align:left }
tr:first-child td { border-top:0 } th { border-top:0; font-weight:400; color:var(--soft) }
.setting td:first-child { color:var(--soft); width:9.5em }
.story { margin-top:22px }
.story dl { display:grid; grid-template-columns:6em 1fr; gap:8px 14px; margin:8px 0 0 }
.story dt { color:var(--soft) } .story dd { margin:0; min-width:0 } .story p { margin:0 0 2px }
.legend { font-size:13px; margin-top:10px } .legend tr:first-child td { border-top:1px solid var(--grid) }
.legend td:not(:first-child), .legend th:not(:first-child) {
  text-align:right; padding-left:4px; white-space:nowrap }
.legend td:last-child, .legend th:last-child { padding-right:0 }
.swatch { display:inline-block; width:10px; height:10px; border-radius:3px; margin-right:7px }
.samples { display:grid; gap:14px; grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr)) }
.samples div { min-width:0 }
pre { margin:6px 0 0; padding:10px 12px; border-radius:8px; background:var(--paper); overflow:auto;
      max-height:220px;
      font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace; white-space:pre-wrap }
pre i { color:var(--soft); font-style:normal } .good { color:var(--good) } .bad { color:var(--bad) }
@media (max-width: 520px) {
  main { padding:22px 10px 40px } .card { padding:14px 12px } h1 { font-size:23px }
  .story dl { display:block } .story dd { margin:0 0 8px } td, th { padding-right:8px }
}
"""


def card(title: str, note: str, body: str, *, beside: str = "") -> str:
    """A titled box with a figure; with something `beside` it the box takes a whole row."""
    if beside:
        body = f'<div class="grid"><div>{body}</div><div>{beside}</div></div>'
    kind = "card row" if beside else "card"
    return f'<article class="{kind}"><h2>{title}</h2><p class="note">{note}</p>{body}</article>'


def table(cells: Mapping[str, str]) -> str:
    """Names and what they say."""
    rows = (
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(value)}</td></tr>" for key, value in cells.items()
    )
    return f'<table class="setting">{"".join(rows)}</table>'
