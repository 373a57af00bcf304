#!/usr/bin/env python3
"""Opens reports in headless Chromium, at the width of a phone and of a desk, light and dark, and looks.

    tests/browser.py report.html [...] [--shots DIR]

Every plot must be there, with marks that lie inside it and differ from the paper; letters must be readable; nothing may stick
out at the side; the colours must follow the reader's choice; the console must be empty. Ends with 1 and a line for each fault,
with 0 and a line that says what was seen, or with 77 where there is no Chromium.
"""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

WIDTHS = {"phone": 390, "desk": 1280}
SCHEMES = {"dark": 0, "light": 1}
# without these it looks for updates at every start
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--disable-quic", "--hide-scrollbars", "--enable-logging=stderr"]

# runs inside the copy of the page that is looked at
LOOK = """
document.querySelectorAll('details').forEach(d => d.open = true);
const faults = [], lightness = c => { const [r, g, b] = c.match(/[0-9.]+/g).map(Number); return 0.3 * r + 0.6 * g + 0.1 * b; };
const plots = [...document.querySelectorAll('figure.plot')];
if (!plots.length) faults.push('no plot');
for (const plot of plots) {
  const svg = plot.querySelector('svg'), name = plot.querySelector('figcaption').firstChild.textContent;
  const box = svg.getBoundingClientRect(), paper = getComputedStyle(plot).backgroundColor;
  if (box.width < 250 || box.height < 150) faults.push(`${name}: ${box.width} x ${box.height} pixels`);
  const size = parseFloat(getComputedStyle(svg).fontSize) * box.width / 380;
  if (size < 9) faults.push(`${name}: letters of ${size.toFixed(1)} pixels`);
  let seen = 0;
  for (const mark of svg.querySelectorAll('polyline, circle:not(.hit), path')) {
    const at = mark.getBoundingClientRect(), style = getComputedStyle(mark);
    if (!at.width && !at.height || style.visibility == 'hidden' || style.display == 'none') continue;
    if (at.left < box.left - 1 || at.right > box.right + 1 || at.top < box.top - 1 || at.bottom > box.bottom + 1) {
      faults.push(`${name}: a mark lies outside`);
      continue;
    }
    const colour = style.stroke != 'none' ? style.stroke : style.fill;
    if (Math.abs(lightness(colour) - lightness(paper)) < 60) { faults.push(`${name}: ${colour} on ${paper}`); continue; }
    seen++;
  }
  if (!seen) faults.push(`${name}: no mark can be seen`);
  for (const text of svg.querySelectorAll('text')) {
    const at = text.getBoundingClientRect();
    if (at.left < box.left - 1 || at.right > box.right + 2) faults.push(`${name}: the text ${text.textContent} is cut`);
  }
}
const over = document.documentElement.scrollWidth - innerWidth;
if (over > 0) faults.push(`the page is ${over} pixels too wide`);
const dark = lightness(getComputedStyle(document.body).backgroundColor) < 128;
parent.postMessage({ faults, dark, plots: plots.length, width: innerWidth }, '*');
"""


def look(chromium, page, width, scheme, folder, shot=None):
    """Opens `page` in a frame of the wanted width (a window cannot be as narrow as a phone)."""
    copy = folder / "page.html"
    copy.write_text(page if shot else page.replace("</body>", f"<script>{LOOK}</script></body>"))
    height = 12000 if not shot else 2600
    (folder / "frame.html").write_text(
        f"<!DOCTYPE html><body style='margin:0'><iframe src='page.html' style='border:0;width:{width}px;height:{height}px'></iframe>"
        "<script>addEventListener('message', e => document.body.textContent = 'SEEN' + JSON.stringify(e.data) + 'SEEN')</script>")
    what = [f"--screenshot={shot}"] if shot else ["--dump-dom", "--virtual-time-budget=8000"]
    done = subprocess.run(
        [chromium, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}",
         f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", *what, (folder / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=120)
    console = re.findall(r".*CONSOLE.*", done.stderr)
    seen = re.search(r"SEEN(\{.*\})SEEN", done.stdout)
    if not shot and not seen:
        return {"faults": ["the page told nothing", done.stderr[-500:]], "dark": scheme == "dark", "plots": 0, "width": width}, console
    return json.loads(seen[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")) if seen else None, console


def main():
    arguments = sys.argv[1:]
    shots = None
    if "--shots" in arguments:
        at = arguments.index("--shots")
        shots = pathlib.Path(arguments[at + 1])
        del arguments[at:at + 2]
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        print("no Chromium on this machine: the report was not looked at")
        sys.exit(77)
    faults = []
    for path in arguments:
        page = pathlib.Path(path).read_text()
        for name, width in WIDTHS.items():
            for scheme in SCHEMES:
                with tempfile.TemporaryDirectory() as folder:
                    seen, console = look(chromium, page, width, scheme, pathlib.Path(folder))
                    where = f"{path}, {name}, {scheme}"
                    found = seen["faults"] + console
                    if seen["dark"] != (scheme == "dark"):
                        found.append(f"the paper is {'dark' if seen['dark'] else 'light'}")
                    if seen["width"] != width:
                        found.append(f"looked at {seen['width']} pixels instead of {width}")
                    faults += [f"{where}: {fault}" for fault in found]
                    print(f"{where}: {seen['plots']} plots, {len(found)} faults")
                    if shots:
                        shots.mkdir(parents=True, exist_ok=True)
                        look(chromium, page, width, scheme, pathlib.Path(folder), shots / f"{pathlib.Path(path).stem}_{name}_{scheme}.png")
    for fault in faults:
        print(fault)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
