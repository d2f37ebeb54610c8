"""A page to try MAML on: draw characters and see them recognised, click points and see a sinusoid learnt.

    python demo.py [--port=8000] [--nobrowser]

The page is for this machine alone: it is served at 127.0.0.1, and only to itself.
"""

import devices  # isort: skip  before TensorFlow, which reads what it sets

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
SHOWN = (0, 1, 10)  # updates whose curves are shown
MOST_BYTES = 400_000  # of a request's body; six long drawings have some 100,000
MOST_POINTS = 5_000  # of a drawing
MOST_SINUSOID_POINTS = 50

# How Omniglot's drawings lie on their paper of 105 x 105: the median of the longer side and the mean of the middle, of
# 360 drawings. The pen's width is the one that gives as much ink as they have, 7.5 %.
PAPER, LONGER_SIDE, MIDDLE, PEN = 105, 65, 50, 4


class Characters:
    """The published Omniglot model, asked about a drawing."""

    def __init__(self):
        self.model = predict.load(predict.PUBLISHED / CHARACTERS)
        dot = [[[0.5, 0.5]]]
        self.answer({"labelled": [dot] * self.model.recipe.way, "asked": dot})  # so that nobody waits for the tracing

    def answer(self, given: dict) -> dict:
        """Gives the probability of each class before and after each update.

        given: labelled, a drawing for each class, and asked, a drawing; see ink.
        """
        labelled, asked = given.get("labelled"), given.get("asked")
        if not isinstance(labelled, list) or len(labelled) != self.model.recipe.way:
            raise BadRequest(f"labelled is not a list of {self.model.recipe.way} drawings")
        support, query = np.stack([ink(drawing) for drawing in labelled]), ink(asked)[None]
        adapted = self.model.adapt(support, range(len(support)))
        updates = range(len(adapted.trajectory))
        return {"probabilities": [adapted.predict(query, j)[0].tolist() for j in updates]}


class Sinusoid:
    """MAML's and the pretrained sinusoid model, fitted to points."""

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
            for j in range(max(SHOWN)):
                trajectory.append(inner_step(inner, trajectory[-1], Tasks(x, y, x, y), j))
            return [inner.network.apply(trajectory[updates], tf.constant(self.x))[:, 0] for updates in SHOWN]

        return fit

    def answer(self, given: dict) -> dict:
        """Gives the curves before and after updates: label -> updates -> y at x. given: points, [[x, y], ...]."""
        points = _points(given.get("points"), MOST_SINUSOID_POINTS, low=-10, high=10)
        x, y = (tf.constant([[point[i]] for point in points], tf.float32) for i in (0, 1))
        curves = {
            label: {updates: curve.numpy().tolist() for updates, curve in zip(SHOWN, fit(x, y), strict=True)}
            for label, fit in self.fits.items()
        }
        if not np.isfinite([list(curve.values()) for curve in curves.values()]).all():
            raise BadRequest("the fit diverged: take points nearer to the middle")
        return {"x": self.x[:, 0].tolist(), "curves": curves}


def ink(drawing: object) -> np.ndarray:
    """Makes of a drawing what Omniglot's images are: black and white, [28, 28] uint8, ink is 0.

    drawing: strokes, each a list of points [x, y] of 0 to 1, y downwards. It is moved and scaled to lie on the paper
    as Omniglot's drawings do. Raises BadRequest where it is not that.
    """
    if not isinstance(drawing, list) or not 1 <= len(drawing) <= MOST_POINTS:
        raise BadRequest(f"a drawing is a list of 1 to {MOST_POINTS} strokes")
    strokes = [_points(stroke, MOST_POINTS, low=0, high=1) for stroke in drawing]
    points = np.array([point for stroke in strokes for point in stroke])
    if len(points) > MOST_POINTS:
        raise BadRequest(f"a drawing has {MOST_POINTS} points at most")
    low, high = points.min(0), points.max(0)
    scale = LONGER_SIDE / max((high - low).max(), 0.02)  # a dot stays a dot
    paper = Image.new("1", (PAPER, PAPER), 1)
    pen = ImageDraw.Draw(paper)
    for stroke in strokes:
        line = [tuple(point) for point in (np.array(stroke) - (low + high) / 2) * scale + MIDDLE]
        pen.line(line, fill=0, width=PEN)
        for x, y in line:  # round joints and ends
            pen.ellipse((x - PEN / 2, y - PEN / 2, x + PEN / 2, y + PEN / 2), fill=0)
    # By nearest neighbour, as data/omniglot_resized/resize_images.py.
    return np.uint8(paper.resize((28, 28), Image.NEAREST).convert("L"))


def _points(given, most, low, high):
    """Points [x, y] from a stranger, checked."""
    if not isinstance(given, list) or not 1 <= len(given) <= most:
        raise BadRequest(f"expected a list of 1 to {most} points")
    for point in given:
        numbers = isinstance(point, list) and len(point) == 2 and all(type(n) in (int, float) for n in point)
        if not numbers or not all(low <= n <= high for n in point):  # a nan is not
            raise BadRequest(f"a point is [x, y], each from {low} to {high}")
    return given


def _own_hosts(port: str) -> set[str]:
    """What a browser on this machine calls the page's host."""
    names = {"127.0.0.1", "localhost"}
    # A browser leaves out http's own port.
    return {f"{name}:{port}" for name in names} | (names if port == "80" else set())


class Site:
    """The page's files and its two questions, as a WSGI application."""

    def __init__(self, questions: dict[str, Callable[[dict], dict]]):
        """Takes path -> function from the JSON that is sent to the JSON that is answered."""
        self.questions, self.busy = questions, threading.Lock()
        # Read once: no request reads the disk.
        self.files = {path: ((PAGE / name).read_bytes(), kind) for path, (name, kind) in FILES.items()}
        rules = [Rule(path, endpoint=path, methods=["GET"]) for path in self.files]
        rules += [Rule(path, endpoint=path, methods=["POST"]) for path in questions]
        self.map = Map(rules)

    def __call__(self, environ, start_response):
        request = Request(environ)
        request.max_content_length = MOST_BYTES
        try:
            response = self.respond(request)
        except HTTPException as error:
            response = Response(f"{error.code} {error.description}\n", error.code, mimetype="text/plain")
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "no-store"
        return response(environ, start_response)

    def respond(self, request: Request) -> Response:
        """Answers a request. Raises HTTPException where it is not one of ours."""
        # A name that a stranger gave to this machine's address leads here, too.
        if request.headers.get("Host") not in _own_hosts(request.environ["SERVER_PORT"]):
            raise Forbidden("This page is for this machine alone.")
        path, _ = self.map.bind_to_environ(request.environ).match()
        if path in self.files:
            content, kind = self.files[path]
            return Response(content, mimetype=kind)
        if request.headers.get("Origin") != f"http://{request.headers['Host']}":
            raise Forbidden("Only the page itself may ask.")
        if request.mimetype != "application/json":
            raise UnsupportedMediaType("Send application/json.")
        try:
            given = json.loads(request.get_data(cache=False))
        except (ValueError, RecursionError):
            raise BadRequest("This is not JSON.") from None
        if not isinstance(given, dict):
            raise BadRequest("Send a JSON object.")
        with self.busy:  # of many pages at once each waits its turn
            return Response(json.dumps(self.questions[path](given)), mimetype="application/json")


class Quiet(WSGIRequestHandler):
    """Serves requests without a line for each. A connection that says nothing is closed."""

    timeout = 30  # seconds

    def log_request(self, *_):
        pass


def serve(port: int = 0) -> BaseWSGIServer:
    """Makes the server, which listens already: call its serve_forever(). port: 0 takes a free one.

    Raises InputError where the port cannot be had.
    """
    site = Site({"/characters": Characters().answer, "/sinusoid": Sinusoid().answer})
    try:
        listening = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise InputError(
            f"port {port} cannot be had ({os.strerror(error.errno)}): give another --port, or none"
        ) from None
    with listening:
        server = make_server("127.0.0.1", port, site, True, request_handler=Quiet, fd=listening.fileno())
    server.daemon_threads = True
    return server


def main() -> None:
    """Serves the page until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="of the page; a free one, if it is not given")
    parser.add_argument("--nobrowser", action="store_true", help="do not open the browser")
    args = parser.parse_args()
    if not 0 <= args.port < 65536:
        parser.error(f"--port={args.port} must be from 0 to 65535")
    logging.set_verbosity(logging.WARNING)
    devices.start()
    try:
        server = serve(args.port)
        address = f"http://127.0.0.1:{server.port}/"
        print(f"The page is at {address} (Ctrl-C ends it).", flush=True)
        if not args.nobrowser:
            # A browser in a terminal runs until it is left, and meanwhile it wants the page.
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        server.serve_forever()
    except InputError as error:
        print(f"demo.py: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
