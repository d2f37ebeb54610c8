"""A web page for trying MAML: draw characters and see them recognized, click points and see a sinusoid fitted.

    python demo.py [--port=8000] [--nobrowser]

The page is served at 127.0.0.1, to this machine only.
"""

import devices  # isort: skip  before TensorFlow, which reads the environment it sets

import argparse
import json
import os
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf
from absl import logging
from PIL import Image, ImageDraw
from werkzeug.exceptions import BadRequest, Forbidden, HTTPException, UnsupportedMediaType
from werkzeug.routing import Map, Rule
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

import predict
import runs
from files import InputError
from maml import inner_step
from utils import Tasks

PAGE = Path(__file__).resolve().parent / "demo"
FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
CHARACTERS = "cls_5.mbs_32.ubs_1.numstep1.updatelr0.4batchnorm"
SINUSOIDS = {  # the paper's figure 2
    "MAML": "cls_5.mbs_25.ubs_10.numstep1.updatelr0.01nonorm",
    "Pretrained": "cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm.pretrain",
}
STEP_SIZE = 0.01  # alpha, for both sinusoids
UPDATES = (0, 1, 10)  # numbers of updates to draw a curve for
MAX_BYTES = 400_000  # of a request's body; six long drawings take about 100,000
MAX_POINTS = 5_000  # per drawing
MAX_SINUSOID_POINTS = 50

# Layout of Omniglot's drawings on 105 x 105 paper: median length of the longer side and mean center of 360 drawings.
# This pen width gives the same amount of ink, 7.5%.
PAPER, LONGER_SIDE, CENTER, PEN = 105, 65, 50, 4


class Characters:
    """The published Omniglot model, which classifies drawings."""

    def __init__(self):
        self.model = predict.load(predict.PUBLISHED / CHARACTERS, class_orders=1)  # a fifth of the time
        dot = [[[0.5, 0.5]]]
        # Trace now, so that no request waits for it.
        self.answer({"labelled": [dot] * self.model.recipe.way, "asked": dot})

    def answer(self, request: dict) -> dict:
        """Return the probability of each class before and after each update.

        request: "labelled", one drawing per class, and "asked", the drawing to classify. See `ink`.
        """
        labeled, asked = request.get("labelled"), request.get("asked")
        if not isinstance(labeled, list) or len(labeled) != self.model.recipe.way:
            raise BadRequest(f"labelled: must be a list of {self.model.recipe.way} drawings")
        support, query = np.stack([ink(drawing) for drawing in labeled]), ink(asked)[None]
        adapted = self.model.adapt(support, range(len(support)))
        updates = range(self.model.updates + 1)
        return {"probabilities": [adapted.predict(query, j)[0].tolist() for j in updates]}


class Sinusoid:
    """The published MAML and pretrained sinusoid models, fitted to points."""

    def __init__(self):
        self.x = np.linspace(-5, 5, 101, dtype=np.float32)[:, None]
        self.fits = {}
        for label, name in SINUSOIDS.items():
            _, maml, _ = runs.load(predict.PUBLISHED / name)
            points = tf.TensorSpec([None, 1])
            self.fits[label] = tf.function(self._fit(maml), autograph=False).get_concrete_function(points, points)
        self.answer({"points": [[0, 0]]})

    def _fit(self, maml):
        def fit(x, y):
            inner, trajectory = maml.inner._replace(alpha=STEP_SIZE), [maml.values()]
            for j in range(max(UPDATES)):
                trajectory.append(inner_step(inner, trajectory[-1], Tasks(x, y, x, y), j))
            return [inner.network.apply(trajectory[updates], tf.constant(self.x))[:, 0] for updates in UPDATES]

        return fit

    def answer(self, request: dict) -> dict:
        """Return x and the curves: label -> updates -> y at x. request: "points", [[x, y], ...]."""
        points = _checked_points(request.get("points"), MAX_SINUSOID_POINTS, low=-10, high=10)
        x, y = (tf.constant([[point[i]] for point in points], tf.float32) for i in (0, 1))
        curves = {
            label: {updates: curve.numpy().tolist() for updates, curve in zip(UPDATES, fit(x, y), strict=True)}
            for label, fit in self.fits.items()
        }
        if not np.isfinite([list(curve.values()) for curve in curves.values()]).all():
            raise BadRequest("the fit diverged; choose points closer to the center")
        return {"x": self.x[:, 0].tolist(), "curves": curves}


def ink(drawing: object) -> np.ndarray:
    """Return a drawing in the format of Omniglot's images: [28, 28] uint8, ink is 0, paper 255.

    drawing: strokes, each a list of points [x, y] in 0 to 1, with y pointing down. It is centered and scaled like
    Omniglot's drawings. Raise BadRequest if it is malformed.
    """
    if not isinstance(drawing, list) or not 1 <= len(drawing) <= MAX_POINTS:
        raise BadRequest(f"drawing: must be a list of 1 to {MAX_POINTS} strokes")
    strokes = [_checked_points(stroke, MAX_POINTS, low=0, high=1) for stroke in drawing]
    points = np.array([point for stroke in strokes for point in stroke])
    if len(points) > MAX_POINTS:
        raise BadRequest(f"drawing: must have at most {MAX_POINTS} points")
    low, high = points.min(0), points.max(0)
    scale = LONGER_SIDE / max((high - low).max(), 0.02)  # a dot stays a dot
    paper = Image.new("1", (PAPER, PAPER), 1)
    pen = ImageDraw.Draw(paper)
    for stroke in strokes:
        line = [tuple(point) for point in (np.array(stroke) - (low + high) / 2) * scale + CENTER]
        pen.line(line, fill=0, width=PEN)
        for x, y in line:  # round joints and ends
            pen.ellipse((x - PEN / 2, y - PEN / 2, x + PEN / 2, y + PEN / 2), fill=0)
    # Nearest neighbor, as in data/omniglot_resized/resize_images.py.
    return np.uint8(paper.resize((28, 28), Image.NEAREST).convert("L"))


def _checked_points(points, limit, low, high):
    """Return `points`, which are untrusted, if they are a list of [x, y]. Otherwise raise BadRequest."""
    if not isinstance(points, list) or not 1 <= len(points) <= limit:
        raise BadRequest(f"points: must be a list of 1 to {limit}")
    for point in points:
        numbers = isinstance(point, list) and len(point) == 2 and all(type(n) in (int, float) for n in point)
        if not numbers or not all(low <= n <= high for n in point):  # False for NaN
            raise BadRequest(f"points: each must be [x, y] from {low} to {high}")
    return points


def _own_hosts(port: str) -> set[str]:
    """Return the Host headers that a browser on this machine sends."""
    names = {"127.0.0.1", "localhost"}
    # Browsers omit the default port of HTTP.
    return {f"{name}:{port}" for name in names} | (names if port == "80" else set())


class Site:
    """The page's files and its two JSON endpoints, as a WSGI application."""

    def __init__(self, endpoints: dict[str, Callable[[dict], dict]]):
        """endpoints: path -> function from the request's JSON object to the response's."""
        self.endpoints, self.busy = endpoints, threading.Lock()
        # Read once, so that no request reads the disk.
        self.files = {path: ((PAGE / name).read_bytes(), kind) for path, (name, kind) in FILES.items()}
        rules = [Rule(path, endpoint=path, methods=["GET"]) for path in self.files]
        rules += [Rule(path, endpoint=path, methods=["POST"]) for path in endpoints]
        self.map = Map(rules)

    def __call__(self, environ, start_response):
        request = Request(environ)
        request.max_content_length = MAX_BYTES
        try:
            response = self.respond(request)
        except HTTPException as error:
            response = Response(f"{error.code} {error.description}\n", error.code, mimetype="text/plain")
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "no-store"
        return response(environ, start_response)

    def respond(self, request: Request) -> Response:
        """Return the response. Raise HTTPException for a request that the page would not make."""
        # Against DNS rebinding: anyone can point their own host name at 127.0.0.1.
        if request.headers.get("Host") not in _own_hosts(request.environ["SERVER_PORT"]):
            raise Forbidden("Host: must be this machine; open the address that demo.py printed")
        path, _ = self.map.bind_to_environ(request.environ).match()
        if path in self.files:
            content, kind = self.files[path]
            return Response(content, mimetype=kind)
        if request.headers.get("Origin") != f"http://{request.headers['Host']}":
            raise Forbidden("Origin: must be the page itself; open the address that demo.py printed")
        if request.mimetype != "application/json":
            raise UnsupportedMediaType("Content-Type: must be application/json")
        try:
            question = json.loads(request.get_data(cache=False))
        except (ValueError, RecursionError):
            raise BadRequest("body: is not JSON") from None
        if not isinstance(question, dict):
            raise BadRequest("body: must be a JSON object")
        with self.busy:  # one request at a time
            return Response(json.dumps(self.endpoints[path](question)), mimetype="application/json")


class Quiet(WSGIRequestHandler):
    """A request handler that logs nothing and closes idle connections."""

    timeout = 30  # seconds

    def log_request(self, *_):
        pass


def serve(port: int = 0) -> BaseWSGIServer:
    """Return a server that already listens; call its serve_forever(). port: 0 picks a free one.

    Raise InputError if the port is not available.
    """
    site = Site({"/characters": Characters().answer, "/sinusoid": Sinusoid().answer})
    try:
        listening = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise InputError(
            f"--port={port}: is not available ({os.strerror(error.errno)}); choose another or leave it out"
        ) from None
    with listening:
        server = make_server("127.0.0.1", port, site, True, request_handler=Quiet, fd=listening.fileno())
    server.daemon_threads = True
    return server


def main() -> None:
    """Serve the page until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="port of the page (default: a free one)")
    parser.add_argument("--nobrowser", action="store_true", help="do not open the browser")
    args = parser.parse_args()
    if not 0 <= args.port < 65536:
        parser.error(f"--port={args.port}: must be from 0 to 65535")
    logging.set_verbosity(logging.WARNING)
    devices.start()
    try:
        server = serve(args.port)
        address = f"http://127.0.0.1:{server.port}/"
        print(f"The page is at {address} (Ctrl-C to stop).", flush=True)
        if not args.nobrowser:
            # In a thread, because a terminal browser blocks until the user quits, and needs the server meanwhile.
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        server.serve_forever()
    except InputError as error:
        print(f"demo.py: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
