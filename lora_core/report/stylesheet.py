"""How a report looks: one style sheet, which the page carries in itself.

Written for a phone first: one column, 16 px, and nothing that is wider than the screen but scrolls
inside itself. Dark where the reader's system is. A figure is drawn in two shapes and the screen's
width picks one (figures.py); its colours are variables of this sheet, so that one drawing serves
both schemes. On paper all is black on white and nothing is folded or cut.

Every pair of text and ground has a contrast of 4.5 or more, a line of a figure 3 or more; a test
computes them from this text (WCAG 2.2, 1.4.3 and 1.4.11).
"""

from lora_core.report.palette import DARK, LIGHT

__all__ = ["style_sheet"]

_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);overflow-wrap:anywhere;
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
main{max-width:47rem;margin:0 auto;padding:1.25rem 1rem 3rem}
h1{font-size:1.7rem;line-height:1.2;margin:.2em 0 .2em;letter-spacing:-.01em}
h2{font-size:1.3rem;line-height:1.3;margin:2.2em 0 .5em;padding-top:.7em;
 border-top:1px solid var(--rule)}
h3{font-size:1.08rem;margin:1.6em 0 .4em}
p{margin:.6em 0}
.subtitle{color:var(--faint);margin-top:0}
nav ul{list-style:none;margin:1em 0 0;padding:0;display:flex;flex-wrap:wrap;gap:.15rem 1.1rem}
a{color:var(--link)}
nav a{display:inline-block;padding:.35em 0}
:focus-visible{outline:3px solid var(--link);outline-offset:2px}
dl{display:grid;grid-template-columns:minmax(8rem,max-content) minmax(0,1fr);margin:1em 0;
 border-top:1px solid var(--rule)}
dt,dd{margin:0;padding:.35em 0;border-bottom:1px solid var(--rule)}
dt{color:var(--faint);padding-right:1em;max-width:14rem}
.scroll{overflow-x:auto;margin:1em 0;border:1px solid var(--rule);border-radius:8px}
table{border-collapse:separate;border-spacing:0;width:100%}
caption{text-align:left;color:var(--faint)}
caption div{position:sticky;left:0;width:max-content;max-width:calc(100vw - 2.2rem);
 padding:.6em .75em}
th,td{text-align:left;vertical-align:top;padding:.45em .75em;border-top:1px solid var(--rule)}
td>div,th>div{width:max-content;max-width:min(26rem,66vw);max-height:24rem;overflow:auto}
tbody th>div{max-width:min(13rem,36vw)}
thead th{border-top:0;background:var(--raised);font-weight:600;vertical-align:bottom}
thead th>div{max-width:8rem;text-wrap:balance}
caption+thead th{border-top:1px solid var(--rule)}
tbody th,thead th:first-child{position:sticky;left:0;border-right:1px solid var(--rule)}
tbody th{font-weight:600;background:var(--ground)}
.num{text-align:right;font-variant-numeric:tabular-nums}
.num>div{margin-left:auto}
.range,.count{color:var(--faint);font-size:.875em}
.range{white-space:nowrap}
.count{display:block}
.note{color:var(--faint);font-size:.9375rem;margin:.3em 0}
figure{margin:1.4em 0}
figure svg *{stroke-linejoin:round;stroke-linecap:butt}
figure svg text{font-family:inherit}
figure svg,figure img{display:block;width:100%;height:auto}
figure img{background:#fff;border-radius:8px}
figcaption{color:var(--faint);font-size:.9375rem;margin-top:.5em}
.wide{display:none}
blockquote,pre{margin:.8em 0;padding:.7em .9em;background:var(--raised);border-radius:8px;
 white-space:pre-wrap;overflow:auto;max-height:32rem}
blockquote{border-left:4px solid var(--rule);border-radius:0 8px 8px 0}
pre,code{font:.9375rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.who{display:block;color:var(--faint);font-size:.875rem;white-space:normal}
details{margin:1em 0;border:1px solid var(--rule);border-radius:8px;padding:0 .9em}
summary{cursor:pointer;padding:.7em 0;font-weight:600}
@media(min-width:40rem){.wide{display:block}.narrow{display:none}main{padding:2rem 1.5rem 4rem}
 h1{font-size:2.1rem}}
@media(min-width:50rem){main>.scroll{position:relative;left:50%;translate:-50% 0;
 width:max-content;min-width:100%;max-width:min(calc(100vw - 4rem),80rem)}}
@media(max-width:26rem){dl{grid-template-columns:7.5rem minmax(0,1fr)}
 .num .range{display:block}}
@media print{main{max-width:none;padding:0}body{font-size:11pt}
 .scroll,blockquote,pre,td>div,th>div{overflow:visible;max-height:none}nav{display:none}
 table{font-size:9pt}td>div,th>div{width:auto}
 figure,tr,blockquote{break-inside:avoid}h2,h3{break-after:avoid}
 details::details-content{content-visibility:visible;block-size:auto}
 .wide{display:block}.narrow{display:none}}
"""


def style_sheet() -> str:
    """The rules, with the colours of both schemes as variables.

    Returns:
        CSS that names nothing outside of itself.
    """
    light, dark = (
        "".join(f"--{name}:{colour};" for name, colour in scheme.items())
        for scheme in (LIGHT, DARK)
    )
    return (
        f":root{{color-scheme:light dark;{light}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}{_RULES}"
    )
