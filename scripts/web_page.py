"""One HTML file without external files: pictures are inside, nothing is fetched."""

from __future__ import annotations

import base64
from html import escape

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1d2430; background: #fff; margin: 0 auto;
       padding: 1.5rem 2rem 4rem; max-width: 1500px; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem; border-top: 1px solid #d7dce3; padding-top: 1rem; }
p { max-width: 62rem; margin: .5rem 0; } .note { color: #5a6472; font-size: .9rem; }
pre { background: #f3f5f8; padding: .7rem 1rem; border-radius: 4px; overflow-x: auto; font-size: .85rem; }
.wide { overflow-x: auto; } .wide img { display: block; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; }
.plots img { width: 40rem; max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .6rem 0; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid #e3e7ec; vertical-align: top; }
th { background: #f3f5f8; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
td { font-variant-numeric: tabular-nums; }
.under { display: block; color: #5a6472; font-size: .8rem; white-space: nowrap; }
table.grid td, table.grid th { text-align: center; padding: 3px; border: 0; }
table.grid th { position: sticky; top: 0; }
table.grid td.side { position: sticky; left: 0; background: #fff; text-align: left; vertical-align: middle;
  min-width: 9rem; max-width: 14rem; padding-right: .6rem; }
table.grid img { display: block; } .missing { background: #eee4e4; padding: .5rem; text-align: left; }
.swatch { display: inline-block; width: 1.4rem; height: 0; border-top: 3px solid; vertical-align: middle;
  margin-right: .5rem; }
@media (max-width: 640px) { body { padding: 1rem .8rem 3rem; } h1 { font-size: 1.3rem; }
  th, td { padding: .3rem .45rem; } .under { white-space: normal; }
  table.grid td.side { min-width: 5rem; max-width: 6.5rem; font-size: .75rem; }
  table.grid img { width: 120px; } }
"""


def document(title: str, body: str) -> str:
    """Return a whole page; `body` is HTML."""
    name = escape(title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{name}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n<h1>{name}</h1>\n{body}\n</body></html>\n"
    )


def inlined(content: bytes, kind: str) -> str:
    """Return a picture as a data URL; `kind` is png or jpeg."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
