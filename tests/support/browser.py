"""A page opened in headless Chromium, by its debugging protocol: what it says, asks for and looks like."""

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-port=0",
)
LOADING_SECONDS = 60
# Of each picture its size, and how many colours a few thousand of its pixels have.
PICTURES = """
Promise.all([...document.images].filter(i => i.alt).map(async i => {
  await i.decode();
  const c = document.createElement("canvas");
  c.width = 200; c.height = 200;
  const p = c.getContext("2d");
  p.drawImage(i, 0, 0, 200, 200);
  const d = new Uint32Array(p.getImageData(0, 0, 200, 200).data.buffer);
  return {alt: i.alt, width: i.naturalWidth, height: i.naturalHeight, colours: new Set(d).size,
          shown: i.getBoundingClientRect().width};
}))
"""


@dataclass
class Seen:
    """What a browser saw of a page."""

    said: list[str] = field(default_factory=list)  # on its console, and errors
    asked: list[str] = field(default_factory=list)  # URLs that are not data
    pictures: list[dict] = field(default_factory=list)
    screenshot: bytes = b""
    results: list = field(default_factory=list)  # of the scripts asked for


def look(page, width=1400, dark=False, scripts=(), media="screen"):
    """Open a page of the disk at a width, light or dark, as on paper; run scripts in it; photograph all of it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # its children end after it
        words = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
            try:
                return asyncio.run(_look(Path(folder), Path(page).resolve().as_uri(), width, dark, scripts, media))
            finally:
                browser.terminate()
                browser.wait()


async def _look(folder, url, *how):
    port = _port(folder / "DevToolsActivePort")
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json") as answer:
            (tab,) = [t for t in await answer.json() if t["type"] == "page"]
        async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            return await asyncio.wait_for(_visit(_Tab(socket), url, *how), LOADING_SECONDS)


def _port(path):
    end = time.monotonic() + LOADING_SECONDS
    while not path.exists() or not path.read_text().strip():
        assert time.monotonic() < end, "chromium does not start"
        time.sleep(0.05)
    return int(path.read_text().split()[0])


async def _visit(tab, url, width, dark, scripts, media):
    for domain in ("Page", "Runtime", "Log", "Network"):
        await tab.call(f"{domain}.enable")
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    await tab.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    await tab.call("Emulation.setDeviceMetricsOverride", **screen)
    await tab.call("Page.navigate", url=url)
    await tab.until("Page.loadEventFired")
    seen = tab.seen
    seen.pictures = await tab.run(PICTURES)
    seen.results = [await tab.run(script) for script in scripts]
    shot = await tab.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
    seen.screenshot = base64.b64decode(shot["data"])
    await tab.call("Browser.close")
    return seen


class _Tab:
    def __init__(self, socket):
        self.socket, self.count, self.seen, self.events = socket, 0, Seen(), set()

    async def call(self, method, **parameters):
        self.count += 1
        await self.socket.send_json({"id": self.count, "method": method, "params": parameters})
        while (message := await self._next()).get("id") != self.count:
            pass
        assert "error" not in message, (method, message["error"])
        return message["result"]

    async def run(self, script):
        found = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    async def until(self, event):
        while event not in self.events:
            await self._next()

    async def _next(self):
        message = json.loads((await self.socket.receive()).data)
        method, told = message.get("method"), message.get("params", {})
        self.events.add(method)
        if method in {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}:
            self.seen.said.append(json.dumps(told)[:500])
        if method == "Network.requestWillBeSent" and not told["request"]["url"].startswith("data:"):
            self.seen.asked.append(told["request"]["url"])
        return message
