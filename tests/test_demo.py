"""demo.py: its server under untrusted requests, and its page in a real browser."""

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
    """Send a request with the page's headers, changed by `headers` (None leaves one out). Return status and body."""
    host = f"127.0.0.1:{server.port}"
    headers = {"Host": host, "Origin": f"http://{host}", "Content-Type": "application/json"} | headers
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request(method, path, body, {name: value for name, value in headers.items() if value})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def ask(server, path, question) -> tuple[int, str]:
    return send(server, "POST", path, json.dumps(question))


def drawings() -> list[list]:
    """Return five characters, drawn twice: the second drawings are the first ones jittered, moved and made smaller."""
    random = np.random.default_rng(5)
    strokes = random.uniform(0.15, 0.85, size=(5, 3, 4, 2))
    again = 0.05 + 0.8 * (strokes + random.normal(scale=0.02, size=strokes.shape))
    return [strokes.round(3).tolist(), again.clip(0, 1).round(3).tolist()]


def test_terminal_browser_gets_the_page(tmp_path):
    """It blocks until the user quits, and needs the server meanwhile."""
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
def test_host_may_omit_only_the_default_port(port):
    """Calls the application without a server, because port 80 needs privileges."""
    browser = Client(demo.Site({}))
    for host, status in (("localhost", 200 if port == 80 else 403), (f"localhost:{port}", 200), ("example.org", 403)):
        answer = browser.get("/", headers={"Host": host}, environ_overrides={"SERVER_PORT": str(port)})
        assert answer.status_code == status, host


def test_characters_are_recognized(server):
    first, again = drawings()
    for true, asked in enumerate(again):
        status, text = ask(server, "/characters", {"labelled": first, "asked": asked})
        assert status == 200
        rows = json.loads(text)["probabilities"]
        assert np.shape(rows) == (4, 5)  # before any update, and after each of three
        np.testing.assert_allclose(np.sum(rows, 1), 1, atol=1e-4)
        assert np.argmax(rows[-1]) == true


def test_ink_is_scaled_and_centered_like_omniglot():
    """A drawing's place and size do not matter, and it has about as much ink as the data."""
    square = [[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]
    large = demo.ink([square])
    small = demo.ink([(0.7 + 0.2 * np.array(square)).tolist()])
    np.testing.assert_array_equal(large, small)
    rows, columns = np.nonzero(large == 0)
    for places in (rows, columns):
        assert 16 <= np.ptp(places) <= 19  # 65 of 105 pixels, plus the pen
        assert abs((places.min() + places.max()) / 2 - 13) <= 1
    assert set(np.unique(large)) == {0, 255}
    dot = demo.ink([[[0.2, 0.9]]])
    assert 1 <= (dot == 0).sum() <= 4
    first, _ = drawings()
    assert 0.04 < np.mean([demo.ink(drawing) == 0 for drawing in first]) < 0.15


def test_maml_fits_a_sinusoid_better_than_pretraining(server):
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
def test_invalid_bodies_are_refused(server, path, body):
    assert send(server, "POST", path, body)[0] == 400
    assert ask(server, "/sinusoid", {"points": [[1, 2]]})[0] == 200  # the server still answers


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
def test_foreign_requests_are_refused(server, status, method, path, headers):
    answer, _ = send(server, method, path, json.dumps({"points": [[1, 2]]}) if method == "POST" else None, **headers)
    assert answer == status or (status == 404 and answer == 308)  # Werkzeug redirects // to /


def test_security_policy_allows_only_own_files_and_no_framing(server):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/", timeout=60) as response:
        policy = response.headers["Content-Security-Policy"].split("; ")
    assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= set(policy)


def test_huge_bodies_are_refused_unread(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    host = f"127.0.0.1:{server.port}"
    connection.putrequest("POST", "/characters")
    for name, value in (("Origin", f"http://{host}"), ("Content-Type", "application/json"), ("Content-Length", 10**8)):
        connection.putheader(name, str(value))
    connection.endheaders(b"[" * 1000)
    assert connection.getresponse().status == 413  # answered before the body is sent
    connection.close()
    assert send(server, "GET", "/")[0] == 200


def test_parallel_requests_get_the_same_answer(server):
    first, again = drawings()
    question = {"labelled": first, "asked": again[2]}
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: ask(server, "/characters", question), range(20)))
    assert {status for status, _ in answers} == {200}
    assert len({text for _, text in answers}) == 1


def test_port_in_use_is_refused(server):
    with pytest.raises(demo.InputError, match=f"--port={server.port}"):
        demo.serve(server.port)


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(server):
    """A headless Chromium."""
    if not (CHROMIUM and DRIVER):
        pytest.skip("Chromium is not installed: install chromium and chromium-driver")
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
    assert browser.get_log("browser") == []  # no errors and no violations of the page's policy


def draw(page, name, drawing):
    """Draw strokes with the mouse."""
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
    """Focus an element and send it keys."""
    page.execute_script("arguments[0].focus()", element)
    page.switch_to.active_element.send_keys(keys)


def text(page, identifier):
    return page.execute_script("return document.getElementById(arguments[0]).textContent", identifier)


def wait_for(page, identifier, beginning):
    """Return the element's text as soon as it starts with `beginning`."""
    for _ in range(200):
        if text(page, identifier).startswith(beginning):
            return text(page, identifier)
        time.sleep(0.05)
    raise AssertionError(f"{text(page, identifier)!r} does not start with {beginning!r}")


def test_drawing_recognizes_characters_and_undo_and_clear_work(page):
    from selenium.webdriver import Keys
    from selenium.webdriver.common.by import By

    first, again = drawings()
    for name, drawing in zip("ABCDE", first, strict=True):
        draw(page, name, drawing)
    assert text(page, "characters-status") == "Still to draw: ?."
    pad = page.find_element(By.ID, "pad-asked")
    for name, drawing in zip("ABCDE", again, strict=True):
        draw(page, "asked", drawing)
        wait_for(page, "characters-status", f"This is {name}, with probability ")
        assert len(page.find_elements(By.CSS_SELECTOR, "#answers .row")) == 20
        press(page, pad, Keys.DELETE)
        wait_for(page, "characters-status", "Still to draw: ?.")
    draw(page, "asked", again[0][:1])
    press(page, pad, Keys.CONTROL + "z")
    wait_for(page, "characters-status", "Still to draw: ?.")
    page.find_elements(By.XPATH, "//button[text()='Clear']")[1].click()
    wait_for(page, "characters-status", "Still to draw: B, ?.")


def test_second_pointer_neither_draws_nor_ends_the_stroke(page):
    """Such as a palm resting next to the pen."""
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


def test_clicks_and_keys_add_points_to_the_plot(page):
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


def test_diverging_fit_clears_the_curves(page):
    """The old curves fit other points."""
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
    assert "the fit diverged" in wait_for(page, "sinusoid-status", "Error: ")
    assert page.execute_script(painted, plot) - empty < (fitted - empty) / 4
    assert {log["message"].partition(" - ")[0][-9:] for log in page.get_log("browser")} == {
        "/sinusoid"
    }  # the 400 response
    page.find_element(By.ID, "sine-clear").click()


def test_page_fits_a_phone(page):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 700, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        page.refresh()
        assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
