"""The page in a real browser: every button, the keyboard, no error in its console, and no request to another host."""

import asyncio
import shutil
import time

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
waiting = pytest.importorskip("selenium.webdriver.support.ui", reason="selenium is not installed")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and its driver are not installed"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)
HOSTILE = '<img src=x onerror="window.broken=1"><script>window.broken=1</script>&amp;'
EDGES = [390, 1280]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    options.add_argument("--window-size=1280,900")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page as somebody uses it."""

    def __init__(self, browser, url):
        self.browser, self.url = browser, url
        browser.get_log("browser"), browser.get_log("performance")
        browser.get(url)

    def __getitem__(self, name):
        return self.browser.find_element("id", name)

    def until(self, condition, why):
        waiting.WebDriverWait(self.browser, 60, poll_frequency=0.05).until(lambda _: condition(), why)

    def ready(self):
        self.until(lambda: self["status"].text.startswith("Ready"), "the page is set up")
        return self

    def press(self, name, ends=None):
        """Click a button; ends: what the status says when its work is done."""
        self.until(lambda: self[name].is_enabled() and self[name].is_displayed(), f"{name} can be pressed")
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", self[name])
        self[name].click()
        if ends:
            self.ends(ends)

    def ends(self, what):
        self.until(lambda: self["status"].text.startswith(f"{what}: ") and self["stop"].get_attribute("disabled"), what)
        assert not self["error"].is_displayed(), self["error"].text
        self.script("return new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(go)))")

    def script(self, text, *given):
        return self.browser.execute_script(text, *given)

    def type(self, text):
        self.script("arguments[0].value = arguments[1]", self["read"], text)

    @property
    def tokens(self):
        """The tokens that stand in the text."""
        return self.script("return [...document.querySelectorAll('#text .t')].map((own) => own.textContent)")

    def choose(self, index):
        self.script(
            "const time = document.getElementById('time'); time.value = arguments[0];"
            "time.dispatchEvent(new Event('input'))",
            index,
        )
        self.until(lambda: f"Token {index + 1} of" in self["moment"].text, "the moment is chosen")

    def clean(self):
        """Whether nothing went wrong in the browser, and nothing was asked of anybody else."""
        assert not [entry for entry in self.browser.get_log("browser") if entry["level"] != "INFO"]
        asked = self.script("return performance.getEntriesByType('resource').map((own) => own.name)")
        assert all(name.startswith(self.url) for name in asked), asked
        return True


@pytest.fixture
def server(serve):
    return serve(("small", "llama"))


def session_named(server, name):
    return asyncio.run(server.server_state.store.find(name))


@pytest.fixture
def page(browser, server):
    opened = Page(browser, server.url).ready()
    yield opened
    assert opened.clean()
    assert not opened.script("return window.broken"), "nothing that was shown was run"


def test_a_text_is_read_and_written_on(page):
    page.type("the cat sat on the mat; the cat sat é")
    page.press("do-read", "Reading")
    assert "".join(page.tokens) == "the cat sat on the mat; the cat sat é"
    assert page["read"].get_attribute("value") == ""
    assert "38 tokens, mean surprise" in page["sum"].text
    page.script("document.getElementById('count').value = 9")
    page.press("do-write", "Writing")
    assert len(page.tokens) == 47
    assert len(page.browser.find_elements("css selector", "#text .t.written")) == 9
    assert "written by the model" in page["moment"].text
    assert len(page.browser.find_elements("css selector", "#bars li")) == 10
    assert "as after the first token" in page["bytes-title"].text
    assert "reading" in page["ms-title"].text
    assert "writing" in page["ms-title"].text
    kinds = set(
        page.script("return [...document.querySelectorAll('#text .t')].map((own) => own.className.split(' ')[1])")
    )
    assert len(kinds) > 2, "surprise is shown in several steps"
    assert "bits" in page.browser.find_elements("css selector", "#text .t")[4].get_attribute("title")


def test_the_tower_and_the_slots_of_a_moment(page):
    page.type("abcdefgh abcdefgh abcdefgh")
    page.press("do-read", "Reading")
    painted = page.script(
        "const box = document.getElementById('tower'), pixels = box.getContext('2d').getImageData(0, 0, box.width,"
        "box.height).data; return new Set(new Uint32Array(pixels.buffer)).size"
    )
    assert painted > 20, "many colours stand on the canvas"
    page.choose(24)
    rows = [row.text.split() for row in page.browser.find_elements("css selector", "#slots tbody tr")]
    assert ["last", "4", "tokens", "yes", "9"] in rows, rows
    source = page.browser.find_element("css selector", "#text .source")
    assert source.get_attribute("data-index") == "16"
    page.press("latest")
    page.until(lambda: "Token 26 of 26" in page["moment"].text, "the latest moment")
    page.script("arguments[0].scrollIntoView({block: 'center'})", page["tower"])
    # The first column of the canvas stands behind the names of the levels.
    selenium.ActionChains(page.browser).move_to_element_with_offset(
        page["tower"], 92 - page["tower"].size["width"] // 2, 5 - page["tower"].size["height"] // 2
    ).click().perform()
    page.until(lambda: "Token 1 of 26" in page["moment"].text, "a click in the tower chooses")
    page.browser.find_elements("css selector", "#text .t")[6].click()
    page.until(lambda: "Token 7 of 26" in page["moment"].text, "a click in the text chooses")


def test_a_fork_goes_on_exactly_from_its_moment(page, server):
    page.script("document.getElementById('seed').value = 3; document.getElementById('count').value = 12")
    page.type("the cat sat on the mat")
    page.press("do-read", "Reading")
    page.choose(10)
    page.press("fork", "Forking")
    assert "".join(page.tokens) == "the cat sat"
    page.press("do-write", "Writing")
    forked = page.tokens
    page.press("new")
    page.type("the cat sat")
    page.press("do-read", "Reading")
    page.press("do-write", "Writing")
    assert page.tokens == forked, "the state at the moment is that of a text that ends there"
    names = [item.text.split("\n")[0] for item in page.browser.find_elements("css selector", "#tabs .what")]
    assert names == ["Text 1", "Text 1 › 11", "Text 3"]
    page.browser.find_element("css selector", "#tabs [aria-label='Show Text 1']").click()
    page.until(lambda: "".join(page.tokens) == "the cat sat on the mat", "the first text is shown again")
    before = len(server.server_state.store)
    page.browser.find_element("css selector", "#tabs [aria-label='Drop Text 3']").click()
    page.until(lambda: len(server.server_state.store) < before, "what is not needed is deleted on the server")


def test_two_futures_side_by_side(page):
    page.script("document.getElementById('count').value = 15")
    page.type("the cat")
    page.press("do-read", "Reading")
    page.press("compare")
    page.script("document.getElementById('a-temperature').value = 1")
    page.press("both", "Writing two futures")
    texts = [page.script(f"return document.getElementById('{side}-text').textContent") for side in "ab"]
    assert texts[0] != texts[1]
    assert "15 tokens" in page["a-sum"].text
    page.press("close")
    assert not page["futures"].is_displayed()
    page.press("compare")
    page.press("both", "Writing two futures")
    kept = page.script("return document.getElementById('b-text').textContent")
    page.press("b-keep")
    page.until(lambda: "".join(page.tokens) == f"the cat{kept}", "the future that was kept is shown")
    page.press("compare")
    page.press("both", "Writing two futures")
    page.press("a-keep")
    page.until(lambda: len(page.tokens) == 37, "a future of the future")


def test_a_moment_is_saved_opened_and_deleted(page, server):
    page.type("the cat sat on the mat")
    page.press("do-read", "Reading")
    page.choose(6)
    page["name"].send_keys("cat.1")
    page.press("save", "Saving")
    saved = session_named(server, "cat.1")
    assert saved.tokens == 7
    assert saved.saved
    assert "cat.1" in page["saved"].text
    page.press("new")
    page.browser.find_element("css selector", "#saved [aria-label='Open cat.1']").click()
    page.ends("Opening")
    assert "[7 earlier tokens] … the cat" in page["text"].text
    page.script("document.getElementById('count').value = 5")
    page.press("do-write", "Writing")
    assert len(page.tokens) == 5
    assert saved.tokens == 7, "the saved session stays as it is"
    page.browser.find_element("css selector", "#saved [aria-label='Delete cat.1']").click()
    page.ends("Deleting")
    assert "None yet" in page["saved"].text


def test_stop_keeps_what_came(page):
    page.script("document.getElementById('count').value = 5000")
    page.type("the cat")
    page.press("do-read", "Reading")
    page.press("do-write")
    page.until(lambda: len(page.tokens) > 20, "some tokens have come")
    page.press("stop")
    page.ends("Writing")
    assert "stopped" in page["status"].text
    stopped = page.tokens
    assert len(stopped) < 5000
    page.script("document.getElementById('count').value = 5")
    page.press("do-write", "Writing")
    assert page.tokens[: len(stopped)] == stopped
    assert len(page.tokens) == len(stopped) + 5


def test_what_the_server_forgot_is_read_again(page, server):
    page.script("document.getElementById('count').value = 6; document.getElementById('seed').value = 2")
    page.type("the cat")
    page.press("do-read", "Reading")
    store = server.server_state.store
    assert all(own.ttl < 86_400 for own in asyncio.run(store.all())), "what has no name is kept for hours"
    for own in asyncio.run(store.all()):
        asyncio.run(store.delete(own))
    page.press("do-write", "Writing")
    forgotten = page.tokens
    assert [entry["message"].split()[0] for entry in page.browser.get_log("browser")] == [
        f"{page.url}/v1/sessions/{own.id}/fork"
    ]
    page.press("new")
    page.type("the cat")
    page.press("do-read", "Reading")
    page.press("do-write", "Writing")
    assert page.tokens == forgotten
    page["name"].send_keys("kept")
    page.press("save", "Saving")
    assert session_named(server, "kept").ttl > 86_400


def test_sampling_controls_decide(page):
    page.type("the cat")
    page.press("do-read", "Reading")
    page.script(
        "const set = (id, value) => { const box = document.getElementById(id); box.value = value;"
        "box.dispatchEvent(new Event('input')); };"
        "set('temperature', 1.5); set('top-p', 0.95); set('top-k', 1); set('count', 8)"
    )
    assert page["temperature-is"].text == "1.50"
    likeliest = page.browser.find_element("css selector", "#bars li code").text
    page.press("do-write", "Writing")
    shown = page.script("return document.querySelectorAll('#text .t')[7].title.split(' ')[0]")
    assert shown == likeliest, "with top-k 1 the likeliest token is written"


def test_the_keyboard_is_enough(page):
    def keys(*pressed):
        selenium.ActionChains(page.browser).send_keys(*pressed).perform()

    page["read"].clear()
    page["read"].send_keys("the cat sat")
    page["read"].send_keys(selenium.Keys.CONTROL, selenium.Keys.ENTER)
    page.ends("Reading")
    assert "".join(page.tokens) == "the cat sat"
    page.script("document.getElementById('count').value = 6; document.getElementById('text').focus()")
    keys("w")
    page.ends("Writing")
    assert len(page.tokens) == 17
    keys(selenium.Keys.ARROW_LEFT, selenium.Keys.ARROW_LEFT)
    page.until(lambda: "Token 15 of 17" in page["moment"].text, "arrows move in time")
    keys("f")
    page.ends("Forking")
    assert len(page.tokens) == 15
    keys("c")
    page.until(lambda: page["futures"].is_displayed(), "two futures are asked for")
    assert page.script("return document.activeElement.id") == "both"
    keys("?")
    page.until(lambda: page["help"].is_displayed(), "help is shown")
    page["single"].click()
    page["help-close"].click()
    page.script("document.getElementById('text').focus()")
    keys("f")
    assert len(page.browser.find_elements("css selector", "#tabs li")) == 2, "letters are off"
    page.press("keys")
    page["single"].click()
    keys(selenium.Keys.ESCAPE)
    reached = set()
    page.script("document.activeElement.blur(); window.scrollTo(0, 0)")
    for _ in range(60):
        keys(selenium.Keys.TAB)
        reached.add(page.script("return document.activeElement.id"))
        drawn = page.script("return getComputedStyle(document.activeElement).outlineStyle")
        assert drawn != "none" or not page.script("return document.activeElement.matches('button, input, select')")
    enabled = page.script(
        "return [...document.querySelectorAll('button, input, select, textarea')].filter((own) =>"
        "own.id && !own.disabled && own.offsetParent).map((own) => own.id)"
    )
    assert set(enabled) <= reached


def test_what_is_shown_is_never_run(page, server):
    page.type(HOSTILE)
    page.press("do-read", "Reading")
    assert "".join(page.tokens) == HOSTILE
    page["name"].send_keys("plain")
    page.press("save", "Saving")
    session_named(server, "plain").name = HOSTILE
    page.browser.refresh()
    page.ready()
    assert HOSTILE in page["saved"].text
    page.browser.find_element("css selector", "#saved button").click()
    page.ends("Opening")
    assert HOSTILE in page["text"].text
    assert page.script("return document.querySelectorAll('main img, main script').length") == 0
    assert page.script("return document.querySelectorAll('[style*=expression], [onclick]').length") == 0


def test_a_model_of_others_works_without_sessions(page, server):
    page.script(
        "const box = document.getElementById('model'); box.value = 'llama'; box.dispatchEvent(new Event('change'))"
    )
    assert not page["savable"].is_displayed()
    page.type("the cat")
    page.press("do-read", "Reading")
    page.script("document.getElementById('count').value = 4; document.getElementById('seed').value = 1")
    page.press("do-write", "Writing")
    assert len(page.tokens) == 11
    assert page["no-tower"].is_displayed()
    assert page["no-slots"].is_displayed()
    assert "times that after the first token" in page["bytes-title"].text
    page.choose(6)
    page.press("fork", "Forking")
    page.press("do-write", "Writing")
    assert len(page.tokens) == 11


def test_a_refusal_is_said(page, server):
    page.type("the cat")
    page.press("do-read", "Reading")
    page["name"].send_keys("taken")
    page.press("save", "Saving")
    page["name"].send_keys("taken")
    page.press("save")
    page.until(lambda: page["error"].is_displayed(), "an error is shown")
    assert "already" in page["error"].text
    page.type("a" * 100_001)
    page["do-read"].click()
    page.until(lambda: "at most 100,000 characters" in page["error"].text, "a text that is too long is refused")
    refused = [entry["message"] for entry in page.browser.get_log("browser") if entry["level"] != "INFO"]
    assert len(refused) == 1, "the browser notes the answer itself"
    assert "409" in refused[0]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", EDGES)
def test_it_fits_and_is_named(browser, server, width, dark):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    try:
        page = Page(browser, server.url).ready()
        assert (
            page.script("const box = document.getElementById('read'); return box.scrollHeight - box.clientHeight") <= 0
        )
        page.press("do-read", "Reading")
        page.press("compare")
        assert page.script("return document.documentElement.scrollWidth") <= width
        shade = page.script("return getComputedStyle(document.documentElement).backgroundColor")
        assert (sum(map(int, shade.strip("rgb()").split(","))) < 384) == dark
        assert page.script(NAMELESS) == []
        assert page.script(CONTRAST) == []
        assert page.clean()
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


# Controls that no name is told of.
NAMELESS = """
return [...document.querySelectorAll('button, input, select, textarea, canvas, svg, [role=group], section, dialog')]
  .filter((own) => !(own.textContent.trim() && own.matches('button')) && !own.labels?.length
    && !own.getAttribute('aria-label') && !document.getElementById(own.getAttribute('aria-labelledby')))
  .map((own) => own.id || own.outerHTML.slice(0, 80))
"""
# Text with less contrast than WCAG AA asks for (4.5).
CONTRAST = """
const channels = (text) => text.match(/[\\d.]+/g).map(Number);
const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
const light = (rgb) => rgb.slice(0, 3).map((v) => linear(v / 255)).reduce(
  (sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (own) => {
  for (; own; own = own.parentElement) {
    const found = channels(getComputedStyle(own).backgroundColor);
    if (found.length < 4 || found[3] > 0) return found;
  }
};
const seen = (own) => own.offsetParent && !own.disabled && !own.closest('.skip');
return [...document.querySelectorAll('body *')].filter((own) => seen(own)
  && [...own.childNodes].some((part) => part.nodeType === 3 && part.textContent.trim())).filter((own) => {
    const pair = [light(channels(getComputedStyle(own).color)), light(behind(own))].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05) < 4.5;
  }).map((own) => own.outerHTML.slice(0, 120));
"""


def test_a_key_is_asked_for_and_stays_in_the_tab(browser, serve):
    server = serve(("small", "llama"), key="secret")
    page = Page(browser, server.url)
    page.until(lambda: page["ask"].is_displayed(), "a key is asked for")
    page["key"].send_keys("wrong")
    page["key-ok"].click()
    page.until(lambda: "does not know this key" in page["ask-title"].text, "a wrong key is refused")
    page["key"].send_keys("secret")
    page["key-ok"].click()
    page.ready()
    page.press("do-read", "Reading")
    assert page.script("return [localStorage.length, document.cookie, sessionStorage.getItem('dyadlm-key')]") == [
        0,
        "",
        "secret",
    ]
    page.browser.refresh()
    page.ready()
    page.press("forget")
    page.until(lambda: page["ask"].is_displayed(), "the key is asked for again")
    assert page.script("return sessionStorage.length") == 0
    logged = [entry["message"] for entry in browser.get_log("browser") if entry["level"] != "INFO"]
    assert all("401" in message for message in logged), logged


def test_the_policy_forbids_what_stands_in_the_page(page):
    page.script(
        "const own = document.createElement('script'); own.textContent = 'window.inline = 1'; document.body.append(own)"
    )
    page.script("const own = new Image(); own.src = 'http://192.0.2.1/x.png'; document.body.append(own)")
    time.sleep(0.3)
    assert page.script("return window.inline") is None
    page.type("a" * 100_001)
    page["do-read"].click()
    page.until(lambda: "at most 100,000 characters" in page["error"].text, "a text that is too long is refused")
    refused = [entry["message"] for entry in page.browser.get_log("browser")]
    assert len(refused) == 2
    assert all("Content Security Policy" in message for message in refused)
    page.script("performance.clearResourceTimings()")
