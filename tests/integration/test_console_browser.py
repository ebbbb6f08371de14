"""The console in a real browser, with and without script, large and small."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from exportd.v1 import job_pb2
from tests.integration.test_console import HOSTILE, World, world
from tests.support.browser import MISSING, Browser, chromium
from tests.support.gate import BATCH_ROWS
from tests.support.waits import ENOUGH

pytestmark = [pytest.mark.minutes, pytest.mark.skipif(bool(MISSING), reason=MISSING)]

TAB, ENTER = "\ue004", "\ue007"
ROWS = "document.querySelector('#rows')?.textContent ?? ''"
STATE = "document.querySelector('[data-state]')?.dataset.state"


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path / "data") as here:
        yield here


@pytest.fixture
async def browser(tmp_path: Path) -> AsyncIterator[Browser]:
    async with chromium(tmp_path / "profile") as browser:
        yield browser


async def sign_in(here: World, browser: Browser, path: str = "/jobs") -> None:
    await browser.open(f"{here.base}/console{path}")
    await browser.type("#credential", here.keys["admin"])
    await browser.click("main form button")
    assert await browser.url() == f"{here.base}/console{path}"
    # It was refused before: that is told there, and is no fault.
    await browser.complaints()


async def test_progress_moves_without_loading_the_page_anew(
    here: World, browser: Browser
) -> None:
    job_id = await here.create("held", max_part_rows=BATCH_ROWS)
    await here.running(job_id)
    await sign_in(here, browser, f"/jobs/{job_id}")
    await browser.run("(() => { window.loaded = 'once'; return 1 })()")
    await browser.reads(".state", "running")
    here.held.allow(1)
    await browser.holds(f"{ROWS}.startsWith('1\u202f000')")
    here.held.allow(2)
    await browser.holds(f"{ROWS}.startsWith('3\u202f000')")
    await browser.holds("document.querySelector('progress').value == 750")
    assert await browser.run("document.querySelector('.confirm') !== null")
    here.held.open_wide()
    await browser.holds(f"{STATE} == 'succeeded'")
    assert await browser.run("document.querySelector('#announce').textContent") == (
        "The job is succeeded."
    )
    # There is nothing left to cancel, and what there is to see has come by itself.
    assert await browser.run("document.querySelector('.confirm') === null")
    assert await browser.run("document.body.textContent.includes('part-00003')")
    assert await browser.run("window.loaded") == "once"
    assert await browser.complaints() == []


async def test_the_list_of_jobs_moves_and_shows_new_ones(
    here: World, browser: Browser
) -> None:
    await sign_in(here, browser)
    await browser.run("(() => { window.loaded = 'once'; return 1 })()")
    job_id = await here.create("held")
    await browser.holds(f"document.body.textContent.includes('{job_id}')")
    here.held.open_wide()
    await browser.holds("document.querySelector('.state.succeeded') !== null")
    assert await browser.run("window.loaded") == "once"


async def test_what_the_keyboard_is_in_stays_as_it_is(
    here: World, browser: Browser
) -> None:
    first = await here.create("wide")
    await here.settle(first)
    await sign_in(here, browser)
    link = f"document.querySelector('a[href$=\"{first}\"]')"
    await browser.run(f"(() => {{ window.link = {link}; link.focus(); return 1 }})()")
    second = await here.create("wide")
    seen = (
        "performance.getEntriesByType('resource')"
        ".filter((each) => each.name.includes('/live/')).length"
    )
    before = await browser.run(seen)
    async with asyncio.timeout(ENOUGH):
        while await browser.run(seen) < before + 2:
            await asyncio.sleep(0.1)
    assert await browser.run("document.activeElement === window.link")
    await browser.run("window.link.blur()")
    await browser.holds(f"document.body.textContent.includes('{second}')")


async def test_a_job_is_cancelled_with_two_clicks_or_by_keyboard_alone(
    here: World, browser: Browser
) -> None:
    job_id = await here.create("held")
    await sign_in(here, browser, f"/jobs/{job_id}")
    await browser.click(".confirm summary")
    await browser.click(".confirm button")
    await browser.reads(".notice", "The job is cancelled.")
    assert await here.state(job_id) == "CANCELLED"

    job_id = await here.create("held")
    await browser.open(f"{here.base}/console/jobs/{job_id}")
    focused = "document.activeElement.textContent.trim()"
    for wanted in ("Cancel the job…", "Cancel this job"):
        for _ in range(20):
            await browser.press(TAB)
            if await browser.run(focused) == wanted:
                break
        assert await browser.run(focused) == wanted
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert await browser.run(outline) == "solid"
        await browser.press(ENTER)
    await browser.holds("document.querySelector('.notice') !== null")
    assert await here.state(job_id) == "CANCELLED"


async def test_a_link_from_elsewhere_finds_one_signed_in_and_a_form_changes_nothing(
    here: World, browser: Browser
) -> None:
    job_id = await here.create("held")
    await here.running(job_id)
    await sign_in(here, browser)
    address = f"{here.base}/console/jobs/{job_id}"

    async def elsewhere(request: web.Request) -> web.Response:
        page = (
            f'<a href="{address}">an alert</a>'
            f'<form method="post" action="{here.base}/console/cancel">'
            f'<input name="job_id" value="{job_id}"><button>x</button></form>'
        )
        return web.Response(text=page, content_type="text/html")

    app = web.Application()
    app.router.add_get("/", elsewhere)
    async with TestServer(app) as other_site:
        # A name that is another site than the address the console was called by.
        other = f"http://localhost:{other_site.port}/"
        await browser.open(other)
        await browser.click("a")
        assert await browser.run(STATE) == "running"
        await browser.open(other)
        await browser.click("button")
        assert await browser.text("h1") == "Sign in"
    # Nor is anybody signed out by it.
    await browser.open(address)
    assert await browser.run(STATE) == "running"


async def test_a_dead_letter_is_sent_again(here: World, browser: Browser) -> None:
    job_id = await here.dead_letters()
    here.sink.behaviour.clear()
    await sign_in(here, browser)
    await browser.click("nav a[href*='DEAD_LETTERED']")
    await browser.reads("h1", "Dead letters")
    await browser.click("tbody tr:last-child button")
    await browser.reads(".notice", "1 delivery is sent again.")
    await here.sink.arrived("a", 1)
    await browser.open(f"{here.base}/console/deliveries?job={job_id}")
    await browser.click("form.actions button")
    job = await here.settle(job_id)
    assert job.deliveries[0].dead_lettered == 0
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED


async def test_on_a_phone_nothing_is_wider_than_the_screen(
    here: World, browser: Browser
) -> None:
    long = "x" * 200
    odd = await here.create(HOSTILE, labels={"note": long})
    dead = await here.dead_letters(long, endpoint=f"https://{long}", gone=True)
    active = await here.create("held")
    await here.running(active)
    await browser.phone()
    await browser.open(f"{here.base}/console/jobs")
    widths = "[document.documentElement.scrollWidth, window.innerWidth]"
    assert await browser.run(widths) == [360, 360]
    await sign_in(here, browser)
    for path in (
        *("/jobs", f"/jobs/{odd}", f"/jobs/{dead}", f"/jobs/{active}"),
        *(f"/deliveries?job={dead}", "/queues", "/workers", "/datasets", "/datasets/held"),
        f"/jobs?dataset={long}",
    ):
        await browser.open(f"{here.base}/console{path}")
        assert await browser.run(widths) == [360, 360], path
        # Nothing was refused by the policy, and nothing of the callers' ran.
        assert await browser.complaints() == [], path
        # Everything that is pressed is large enough for a thumb.
        small = (
            "[...document.querySelectorAll('button, .button, .top nav a')]"
            ".filter((each) => each.getBoundingClientRect().height < 36)"
            ".map((each) => each.textContent)"
        )
        assert await browser.run(small) == [], path


CONTRAST = """(() => {
  const light = (css) => {
    const [r, g, b, a = 1] = css.match(/[\\d.]+/g).map(Number);
    const [x, y, z] = [r, g, b].map((c) => {
      c /= 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return a && 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ground = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const css = getComputedStyle(each).backgroundColor;
      if (!/, 0\\)$/.test(css)) return light(css);
    }
    throw new Error('the page has no ground');
  };
  const weak = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    const unseen = '.hidden, .skip, noscript, script, option, progress';
    if (!own || element.matches(unseen)) continue;
    const [one, two] = [light(getComputedStyle(element).color), ground(element)];
    const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
    if (ratio < 4.5) weak.push(`${element.className} ${element.textContent}: ${ratio}`);
  }
  return weak;
})()"""
UNNAMED = """[...document.querySelectorAll(
    'input:not([type=hidden]), select, button, a, progress')]
  .filter((each) => !(each.ariaLabel || each.labels?.length || each.textContent.trim()))
  .map((each) => each.outerHTML)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_text_can_be_read_and_whatever_is_used_has_a_name(
    here: World, browser: Browser, scheme: str
) -> None:
    dead = await here.dead_letters(endpoint="x", gone=True)
    await here.dead_letters(endpoint="y")
    active = await here.create("held")
    await here.running(active)
    if scheme == "dark":
        await browser.dark()
    await browser.open(f"{here.base}/console/jobs")
    assert await browser.run(CONTRAST) == []
    assert await browser.run(UNNAMED) == []
    await sign_in(here, browser)
    for path in (
        *("/jobs", f"/jobs/{dead}", f"/jobs/{active}", "/deliveries", "/queues"),
        *("/workers", "/datasets", f"/jobs/{active}?notice=CANCELLED", "/nowhere"),
    ):
        await browser.open(f"{here.base}/console{path}")
        assert await browser.run(CONTRAST) == [], path
        assert await browser.run(UNNAMED) == [], path
        assert await browser.run("document.querySelectorAll('h1').length") == 1, path
        assert await browser.run("document.documentElement.lang") == "en"


async def test_without_script_the_page_loads_itself_anew(
    here: World, browser: Browser
) -> None:
    job_id = await here.create("held", max_part_rows=BATCH_ROWS)
    await here.running(job_id)
    await sign_in(here, browser, f"/jobs/{job_id}")
    await browser.emulate("Emulation.setScriptExecutionDisabled", value=True)
    await browser.open(f"{here.base}/console/jobs/{job_id}")
    here.held.open_wide()
    await here.settle(job_id)
    async with asyncio.timeout(ENOUGH):
        while '<span class="state succeeded">' not in await browser.source():
            await asyncio.sleep(0.1)


async def test_whoever_is_signed_out_meanwhile_is_asked_to_sign_in(
    here: World, browser: Browser
) -> None:
    job_id = await here.create("held")
    await sign_in(here, browser, f"/jobs/{job_id}")
    await browser.emulate("Network.clearBrowserCookies")
    await browser.reads("h1", "Sign in")
