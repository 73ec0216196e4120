"""The README's picture of the page: python tests/screenshot.py PAGE.html PICTURE.png"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

source, picture = sys.argv[1:]
with sync_playwright() as p:
    browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    page = browser.new_page(viewport=dict(width=1200, height=900), color_scheme="light")
    page.goto(Path(source).resolve().as_uri() + "#temperature=0.8&seed=7")
    page.wait_for_selector("#tree span")
    for i in 1, 6, 11:
        page.click(f"#names button >> nth={i}")
    page.fill("#text", "marilynn")
    page.evaluate("document.activeElement.blur()")
    page.mouse.move(0, 0)
    page.screenshot(path=picture, full_page=True)
    browser.close()
