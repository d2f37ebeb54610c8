"""demo.py: its page in a real browser, and what a stranger may send to its server."""

import http.client
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from werkzeug.test import Client

import demo

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))


@pytest.fixture(scope="module")
def server():
    server = demo.serve()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def send(server, method, path, body=None, **headers) -> tuple[int, str]:
    """A request as the page makes it, but for what `headers` says."""
    host = f"127.0.0.1:{server.port}"
    given = {"Host": host, "Origin": f"http://{host}", "Content-Type": "application/json"} | headers
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request(method, path, body, {name: value for name, value in given.items() if value})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def ask(server, path, question) -> tuple[int, str]:
    return send(server, "POST", path, json.dumps(question))


def drawings() -> list[list]:
    """Of five characters, two drawings each: the second is the first, jittered, moved and made smaller."""
    random = np.random.default_rng(5)
    strokes = random.uniform(0.15, 0.85, size=(5, 3, 4, 2))
    again = 0.05 + 0.8 * (strokes + random.normal(scale=0.02, size=strokes.shape))
    return [strokes.round(3).tolist(), again.clip(0, 1).round(3).tolist()]


def test_a_browser_in_the_terminal_gets_the_page(tmp_path):
    """It runs until it is left, and wants the page meanwhile."""
    fetch = (
        "import sys, urllib.request as r;"
        "page = r.build_opener(r.ProxyHandler({})).open(sys.argv[2], timeout=60).read();"
        "open(sys.argv[1], 'wb').write(page)"
    )
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{fetch}" "{tmp_path}/page" "$1"\n')
    browser.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, demo.__file__], env={**os.environ, "BROWSER": f"{browser} %s"}, stdout=subprocess.DEVNULL
    )
    try:
        for _ in range(1800):
            if (tmp_path / "page").is_file() and (tmp_path / "page").stat().st_size:
                break
            time.sleep(0.1)
        assert b"</html>" in (tmp_path / "page").read_bytes()
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("port", (80, 8080))
def test_the_port_of_http_is_not_in_a_browsers_host(port):
    """A browser leaves it out, and no other. The site is asked without a server: few may take port 80."""
    browser = Client(demo.Site({}))
    for host, status in (("localhost", 200 if port == 80 else 403), (f"localhost:{port}", 200), ("example.org", 403)):
        answer = browser.get("/", headers={"Host": host}, environ_overrides={"SERVER_PORT": str(port)})
        assert answer.status_code == status, host


def test_drawings_are_told_apart(server):
    shown, again = drawings()
    for true, asked in enumerate(again):
        status, text = ask(server, "/characters", {"labelled": shown, "asked": asked})
        assert status == 200
        rows = json.loads(text)["probabilities"]
        assert np.shape(rows) == (4, 5)  # before any update, and after each of three
        np.testing.assert_allclose(np.sum(rows, 1), 1, atol=1e-4)
        assert np.argmax(rows[-1]) == true


def test_ink_lies_as_omniglots():
    """Wherever and however large it is drawn, it lies in the middle, with as much ink as the data have."""
    square = [[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]
    large = demo.ink([square])
    small = demo.ink([(0.7 + 0.2 * np.array(square)).tolist()])
    np.testing.assert_array_equal(large, small)
    rows, columns = np.nonzero(large == 0)
    for places in (rows, columns):
        assert 16 <= np.ptp(places) <= 19  # 65 of 105 pixels, and the pen
        assert abs((places.min() + places.max()) / 2 - 13) <= 1
    assert set(np.unique(large)) == {0, 255}
    dot = demo.ink([[[0.2, 0.9]]])
    assert 1 <= (dot == 0).sum() <= 4
    shown, _ = drawings()
    assert 0.04 < np.mean([demo.ink(drawing) == 0 for drawing in shown]) < 0.15


def test_a_sinusoid_is_learnt(server):
    points = [[x, 3.2 * np.sin(x - 1.1)] for x in (-4.2, -3, -1.8, -0.5, 0.9)]
    status, text = ask(server, "/sinusoid", {"points": points})
    assert status == 200
    answer = json.loads(text)
    true = 3.2 * np.sin(np.array(answer["x"]) - 1.1)
    before, _, after = (np.mean((np.array(y) - true) ** 2) for y in answer["curves"]["MAML"].values())
    assert after < 0.5 < before
    assert np.mean((np.array(answer["curves"]["Pretrained"]["10"]) - true) ** 2) > 2 * after


DRAWING = [[[0.5, 0.5]]]


@pytest.mark.parametrize(
    "path, body",
    [
        ("/characters", b"\xff\xfe garbage"),
        ("/characters", b"[" * 100_000),
        ("/characters", b"[1, 2]"),
        ("/characters", b"{}"),
        ("/characters", json.dumps({"labelled": [DRAWING] * 4, "asked": DRAWING}).encode()),
        ("/characters", json.dumps({"labelled": [DRAWING] * 5}).encode()),
        ("/characters", json.dumps({"labelled": [DRAWING] * 5, "asked": [[[0.5, 7]]]}).encode()),
        ("/characters", json.dumps({"labelled": [DRAWING] * 5, "asked": [[[0.5, "a"]]]}).encode()),
        ("/characters", json.dumps({"labelled": [DRAWING] * 5, "asked": [[[0.5, True]]]}).encode()),
        ("/characters", json.dumps({"labelled": [DRAWING] * 5, "asked": [[[float("nan"), 0.5]]]}).encode()),
        ("/characters", json.dumps({"labelled": [DRAWING] * 5, "asked": [[]]}).encode()),
        ("/characters", json.dumps({"labelled": [DRAWING] * 5, "asked": DRAWING * 6000}).encode()),
        ("/characters", json.dumps({"labelled": [DRAWING] * 5, "asked": [DRAWING[0] * 3000] * 2}).encode()),
        ("/sinusoid", b"{}"),
        ("/sinusoid", json.dumps({"points": []}).encode()),
        ("/sinusoid", json.dumps({"points": [[1, 2]] * 51}).encode()),
        ("/sinusoid", json.dumps({"points": [[1e30, 0]]}).encode()),
        ("/sinusoid", json.dumps({"points": [[8, -10]]}).encode()),  # the fit diverges
    ],
)
def test_a_body_that_is_none_of_ours(server, path, body):
    assert send(server, "POST", path, body)[0] == 400
    assert ask(server, "/sinusoid", {"points": [[1, 2]]})[0] == 200  # the server lives


@pytest.mark.parametrize(
    "status, method, path, headers",
    [
        (403, "POST", "/sinusoid", {"Origin": "http://example.com"}),
        (403, "POST", "/sinusoid", {"Origin": None}),
        (403, "POST", "/sinusoid", {"Origin": "null"}),
        (403, "GET", "/", {"Host": "example.com"}),
        (403, "GET", "/", {"Host": "127.0.0.1:1"}),
        (415, "POST", "/sinusoid", {"Content-Type": "text/plain"}),
        (405, "GET", "/sinusoid", {}),
        (405, "POST", "/", {}),
        (404, "GET", "/../demo.py", {}),
        (404, "GET", "/%2e%2e/README.md", {}),
        (404, "GET", "/demo/index.html", {}),
        (404, "GET", "//etc/passwd", {}),
    ],
)
def test_a_request_that_is_not_the_pages(server, status, method, path, headers):
    found, _ = send(server, method, path, json.dumps({"points": [[1, 2]]}) if method == "POST" else None, **headers)
    assert found == status or (status == 404 and found == 308)  # Werkzeug leads // to /


def test_what_a_browser_is_told(server):
    """It runs nothing but the page's own files, and shows the page in no other one."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/", timeout=60) as response:
        policy = response.headers["Content-Security-Policy"].split("; ")
    assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= set(policy)


def test_a_body_of_100_megabytes(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    host = f"127.0.0.1:{server.port}"
    connection.putrequest("POST", "/characters")
    for name, value in (("Origin", f"http://{host}"), ("Content-Type", "application/json"), ("Content-Length", 10**8)):
        connection.putheader(name, str(value))
    connection.endheaders(b"[" * 1000)
    assert connection.getresponse().status == 413  # before it is sent, let alone read
    connection.close()
    assert send(server, "GET", "/")[0] == 200


def test_ten_pages_at_once(server):
    shown, again = drawings()
    question = {"labelled": shown, "asked": again[2]}
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: ask(server, "/characters", question), range(20)))
    assert {status for status, _ in answers} == {200}
    assert len({text for _, text in answers}) == 1


def test_a_port_in_use(server):
    with pytest.raises(
        demo.InputError, match=rf"port {server.port} cannot be had \(Address already in use\): give another --port"
    ):
        demo.serve(server.port)


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(server):
    """Chromium at the page, without a window."""
    if not (CHROMIUM and DRIVER):
        pytest.skip("no Chromium: install Debian's chromium and chromium-driver, or the like")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (requirements-dev.txt)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1100,1500"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


@pytest.fixture
def page(browser, server):
    browser.get(f"http://127.0.0.1:{server.port}/")
    yield browser
    assert browser.get_log("browser") == []  # neither errors nor breaches of the page's own policy


def draw(page, name, drawing):
    """With the mouse, stroke by stroke."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    pad = page.find_element(By.ID, f"pad-{name}")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", pad)
    width, height = pad.size["width"], pad.size["height"]
    mouse = ActionChains(page, duration=0)
    for stroke in drawing:
        places = [(round((x - 0.5) * (width - 4)), round((y - 0.5) * (height - 4))) for x, y in stroke]
        mouse.move_to_element_with_offset(pad, *places[0]).click_and_hold()
        for place in places[1:]:
            mouse.move_to_element_with_offset(pad, *place)
        mouse.release()
    mouse.perform()


def press(page, element, keys):
    """Keys to an element that the keyboard has reached."""
    page.execute_script("arguments[0].focus()", element)
    page.switch_to.active_element.send_keys(keys)


def text(page, identifier):
    return page.execute_script("return document.getElementById(arguments[0]).textContent", identifier)


def wait_for(page, identifier, beginning):
    for _ in range(200):
        if text(page, identifier).startswith(beginning):
            return text(page, identifier)
        time.sleep(0.05)
    raise AssertionError(f"{text(page, identifier)!r} does not begin with {beginning!r}")


def test_characters_in_a_browser(page):
    """Five are drawn, each of them is asked, and is right; undo and clear by keyboard and button."""
    from selenium.webdriver import Keys
    from selenium.webdriver.common.by import By

    shown, again = drawings()
    for name, drawing in zip("ABCDE", shown, strict=True):
        draw(page, name, drawing)
    assert text(page, "characters-status") == "Still to draw: ?."
    pad = page.find_element(By.ID, "pad-asked")
    for name, drawing in zip("ABCDE", again, strict=True):
        draw(page, "asked", drawing)
        wait_for(page, "characters-status", f"It is {name}, with probability ")
        assert len(page.find_elements(By.CSS_SELECTOR, "#answers .row")) == 20
        press(page, pad, Keys.DELETE)
        wait_for(page, "characters-status", "Still to draw: ?.")
    draw(page, "asked", again[0][:1])
    press(page, pad, Keys.CONTROL + "z")
    wait_for(page, "characters-status", "Still to draw: ?.")
    page.find_elements(By.XPATH, "//button[text()='Clear']")[1].click()
    wait_for(page, "characters-status", "Still to draw: B, ?.")


def test_a_palm_beside_the_pen_in_a_browser(page):
    """A second finger neither draws nor ends the stroke of the first."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    pad = page.find_element(By.ID, "pad-asked")
    ActionChains(page).move_to_element(pad).click_and_hold().move_by_offset(5, 9).perform()
    before, drawn = text(page, "characters-status"), page.execute_script("return arguments[0].toDataURL()", pad)
    for kind in ("pointermove", "pointerup", "pointercancel"):
        place = "pointerId: 99, clientX: 9, clientY: 9"
        palm = f"new PointerEvent('{kind}', {{{place}, coalescedEvents: [new PointerEvent('{kind}', {{{place}}})]}})"
        page.execute_script(f"arguments[0].dispatchEvent({palm})", pad)
    assert page.execute_script("return arguments[0].toDataURL()", pad) == drawn
    assert text(page, "characters-status") == before
    ActionChains(page).release().perform()
    assert wait_for(page, "characters-status", "Still to draw: A, B, C, D, E.") != before


def test_the_sinusoid_in_a_browser(page):
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.by import By

    plot = page.find_element(By.ID, "plot-MAML")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    for x, y in ((-100, 20), (-30, -40), (60, 50)):
        ActionChains(page).move_to_element_with_offset(plot, x, y).click().perform()
    wait_for(page, "sinusoid-status", "Fitted to 3 points (")
    press(page, plot, Keys.ARROW_RIGHT + Keys.ARROW_UP + Keys.ENTER)
    wait_for(page, "sinusoid-status", "Fitted to 4 points (")
    page.find_element(By.ID, "sine-undo").click()
    wait_for(page, "sinusoid-status", "Fitted to 3 points (")
    page.find_element(By.ID, "sine-clear").click()
    wait_for(page, "sinusoid-status", "No points yet.")
    page.find_element(By.ID, "sine-example").click()
    wait_for(page, "sinusoid-status", "Fitted to 5 points (")


def test_a_fit_that_diverges_in_a_browser(page):
    """The curves go, since they are of other points."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    plot = page.find_element(By.ID, "plot-MAML")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    painted = (
        "const {width, height} = arguments[0], copy = new OffscreenCanvas(width, height), pen = copy.getContext('2d');"
        "pen.drawImage(arguments[0], 0, 0);"
        "return pen.getImageData(0, 0, width, height).data.filter((value, i) => i % 4 === 3 && value).length"
    )
    page.find_element(By.ID, "sine-clear").click()
    empty = page.execute_script(painted, plot)
    page.find_element(By.ID, "sine-example").click()
    wait_for(page, "sinusoid-status", "Fitted to 5 points (")
    fitted = page.execute_script(painted, plot)
    page.find_element(By.ID, "sine-clear").click()
    half_width, half_height = plot.size["width"] / 2 - 3, plot.size["height"] / 2 - 3
    for right, down in ((half_width, -half_height), (-half_width, half_height)):
        ActionChains(page).move_to_element_with_offset(plot, right, down).click().perform()
    assert "the fit diverged" in wait_for(page, "sinusoid-status", "No answer: ")
    assert page.execute_script(painted, plot) - empty < (fitted - empty) / 4
    assert {log["message"].partition(" - ")[0][-9:] for log in page.get_log("browser")} == {"/sinusoid"}  # the refusal
    page.find_element(By.ID, "sine-clear").click()


def test_the_page_fits_a_phone(page):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 700, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        page.refresh()
        assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
