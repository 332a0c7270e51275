"""A headless Chromium that lays a page out and is asked what it has laid out, for tests.

It is spoken to by its own protocol over two pipes, so that no package is needed for it.
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from itertools import count
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FOUND = next((path for name in NAMES if (path := shutil.which(name))), None)
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


@contextlib.contextmanager
def browser():
    """A `Tab` of a browser that ends with it."""
    to_browser, commands = os.pipe()
    answers, from_browser = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The browser reads descriptor 3 and writes 4, whatever numbers the pipes have here.
        shell = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        process = subprocess.Popen(
            ["bash", "-c", shell, FOUND, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        with open(commands, "wb", buffering=0) as writer, open(answers, "rb", buffering=0) as reader:
            try:
                yield Tab(writer, reader)
            finally:
                process.terminate()
                process.wait()


class Tab:
    """One page at a time."""

    def __init__(self, writer, reader):
        self._writer, self._reader, self._rest, self._ids = writer, reader, b"", count(1)
        self._session = {}
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        self._call("Page.enable")

    def open(self, path, *, width, scheme, height=900):
        """Lay out a file on a screen so wide, in a light or dark scheme."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._call("Emulation.setEmulatedMedia", features=[feature])
        self._call("Page.navigate", url=Path(path).resolve().as_uri())
        self._wait("Page.loadEventFired")

    def evaluate(self, script):
        """The value of a JavaScript expression."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def save_picture(self, path):
        """The whole page as a PNG file."""
        shot = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def _call(self, method, **parameters):
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters, **self._session}
        self._writer.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != number:
            pass
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _wait(self, event):
        while self._read().get("method") != event:
            pass

    def _read(self):
        while b"\0" not in self._rest:
            piece = self._reader.read(1 << 16)
            assert piece, "the browser ended"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


# What is wrong with how a page is laid out, as sentences; [] if nothing is.
FAULTS = r"""
(() => {
  const faults = [], root = document.documentElement;
  if (root.scrollWidth > root.clientWidth)
    faults.push(`the page is ${root.scrollWidth} px wide on a screen of ${root.clientWidth}`);
  const channels = colour => (colour.match(/[\d.]+/g) || []).map(Number);
  const linear = v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => [r, g, b].map(linear)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const paper = node => {
    for (; node && node.nodeType === 1; node = node.parentNode) {
      const colour = channels(getComputedStyle(node).backgroundColor);
      if (colour.length === 3 || colour[3] > .99) return colour;
    }
    return [255, 255, 255];
  };
  const boxes = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walker.nextNode();) {
    const owner = node.parentElement, text = node.textContent.trim();
    if (!text || owner.closest("style, script")) continue;
    const inSvg = owner.closest("svg"), style = getComputedStyle(owner), name = text.slice(0, 40);
    const ink = luminance(channels(inSvg ? style.fill : style.color)), ground = luminance(paper(owner));
    const contrast = (Math.max(ink, ground) + .05) / (Math.min(ink, ground) + .05);
    if (contrast < 4.5) faults.push(`"${name}" has a contrast of ${contrast.toFixed(1)}`);
    const scale = inSvg ? inSvg.getBoundingClientRect().width / inSvg.viewBox.baseVal.width : 1;
    const size = parseFloat(style.fontSize) * scale;
    if (size < 9) faults.push(`"${name}" is ${size.toFixed(1)} px high`);
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects()) {
      if (box.left < -.5 || box.right > root.clientWidth + .5) faults.push(`"${name}" is cut by the screen`);
      const frame = inSvg || owner.closest("pre, .card, .tile");
      if (frame) {
        const edge = frame.getBoundingClientRect();
        const tall = !owner.closest("pre") && (box.top < edge.top - 1 || box.bottom > edge.bottom + 1);
        if (tall || box.left < edge.left - 1 || box.right > edge.right + 1)
          faults.push(`"${name}" leaves its ${frame.tagName.toLowerCase()}`);
      }
      if (!owner.closest("pre")) boxes.push({name, owner, box});
    }
  }
  for (const one of boxes) for (const other of boxes) {
    if (one === other || one.owner === other.owner || one.name > other.name) continue;
    const wide = Math.min(one.box.right, other.box.right) - Math.max(one.box.left, other.box.left);
    const high = Math.min(one.box.bottom, other.box.bottom) - Math.max(one.box.top, other.box.top);
    // Boxes are of whole lines, taller than their letters.
    if (wide > 1 && high > .25 * Math.min(one.box.height, other.box.height))
      faults.push(`"${one.name}" lies over "${other.name}"`);
  }
  return [...new Set(faults)];
})()
"""
