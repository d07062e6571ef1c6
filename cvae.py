"""Text to picture with a CLIP-conditioned variational autoencoder, in one file.

    a photograph x ──┬── CLIP's image encoder ───────────────► condition c
                     │                                           │      │
                     └── encoder ── features ──┬── + c ─► mu, logvar    │
                                               │            │           │
                                               │      z = mu + sigma·e  │
                                               │            │           │
                                               └► ladder ◄──┴─── + c ◄──┘
                                                  decoder ──► picture

    to sample:   prompt ─► CLIP's text encoder ─► prior ─► c,   z drawn given c,   decoder ─► picture

The quickest tour needs neither a download nor a GPU (five minutes on two cores):

    python cvae.py demo

The real thing, on the photographs of MS-COCO that show cows and sheep:

    python cvae.py prepare                            # fetch, crop, embed: one data file
    python cvae.py train --size 128 --dropout         # a run folder with checkpoints and pictures
    python cvae.py sample "sheep on a hill"           # a captioned grid
    python cvae.py evaluate                           # the table that says how good it is

Contents (each `# %%` is a notebook cell in VS Code, Spyder and Jupyter)

    0. Small tools      one place that writes files, one that fetches, one kind of expected error
    1. The data         which COCO photographs are bucolic; fetching only those
    2. CLIP             two encoders, one space; the gap between them and the prior that crosses it
    3. The model        encoder, reparameterisation, ladder decoder, where the condition enters
    4. The objective    the ELBO line by line; the calibrated likelihood; the report's loss
    5. Training
    6. Sampling         from text, from an image, in between
    7. Evaluation
    8. A toy world      drawn pastures and a miniature CLIP, for those without COCO, CLIP or a GPU
    9. The command line

The project it reimplements: Azarbal, Benjelloun Touimi, Tazi, "Generative CLIP-Conditioned
Variational Autoencoders" (Brown University, 2024), called "the report" below.
"""
import argparse
import contextlib
import errno
import hashlib
import http.client
import json
import math
import os
import random
import re
import shlex
import signal
import socket
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from tqdm import tqdm

# clip, matplotlib and pycocotools take a second or more to import, so they are imported where they
# are used: `--help` should not wait for a plotting library.

# %% 0. Small tools ---------------------------------------------------------------------------------


class Stop(Exception):
    """An expected failure. Its text says what happened and what to do; main() prints just that."""


@contextlib.contextmanager
def atomic(path):
    """Give a temporary path beside `path`; rename it to `path` only if the block succeeds.

    A rename within a folder is atomic, so a reader meets the old file or the new one, never half of
    one, whether the writer was killed, ran out of disk or raced another writer.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(obj, path):
    """Write tensors, numbers and strings to `path` with torch.save, atomically."""
    try:
        with atomic(path) as temporary:
            torch.save(obj, temporary)
    except (OSError, RuntimeError) as error:  # a full disk is either, depending on where it strikes
        raise Stop(f"{path} could not be written ({first_line(error)}). What was there before is "
                   "untouched; free some disk space and run the same command again.") from error


def load(path, kind, version):
    """Read a file that `save` wrote and check that it is a `kind` of this version.

    weights_only=True reads tensors and plain containers and runs no code, whatever the file holds.
    mmap=True maps the file: pages are read when they are first touched.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise Stop(f"There is no {kind} at {path}.") from None
    except Exception as error:  # torch reports damage with half a dozen exception types
        raise Stop(f"{path} is no readable {kind}: damaged, cut short, or not written by this program "
                   f"({first_line(error)}).") from error
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise Stop(f"{path} is not a {kind} of this program.")
    if content["version"] != version:
        raise Stop(f"{path} is a {kind} of version {content['version']}; this program reads version "
                   f"{version}. Make it anew.")
    return content


def first_line(error):
    """The first line of an exception's text, or its name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def pick_device():
    """The fastest device that PyTorch sees."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device):
    """bfloat16 for matrix products and convolutions where the hardware has instructions for it."""
    capable = device.type == "cuda" or getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    return torch.autocast(device.type, torch.bfloat16, enabled=capable)


ATTEMPTS, TIMEOUT = 4, 10  # tries per file; seconds without a byte before a connection counts as dead


def fetch(url, path, check, bar=None):
    """Download `url` to `path`: retried with back-off, checked, renamed into place only when whole.

    check(temporary path) raises ValueError for content that is not what was wanted.
    Raises Stop for an address that is not http(s), OSError or ValueError after the last attempt.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise Stop(f"{url!r} is not an http or https address; it was not opened.")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with atomic(path) as temporary:
                with urllib.request.urlopen(url, timeout=TIMEOUT) as response, open(temporary, "wb") as file:
                    expected = int(response.headers.get("Content-Length") or 0)
                    if bar is not None:
                        bar.reset(expected)
                    while block := response.read(1 << 16):
                        file.write(block)
                        if bar is not None:
                            bar.update(len(block))
                if expected and temporary.stat().st_size != expected:
                    raise ValueError(f"{temporary.stat().st_size} of {expected} bytes arrived")
                check(temporary)
            return
        except (OSError, ValueError, http.client.HTTPException) as error:
            gone = isinstance(error, urllib.error.HTTPError) and error.code in (401, 403, 404, 410)
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            if attempt == ATTEMPTS or gone or full:  # trying again would not help
                raise OSError(getattr(error, "errno", None), f"{url}: {first_line(error)}") from error
        time.sleep(0.3 * 2**attempt)  # 0.6, 1.2, 2.4 s: a busy server is given time to recover


# %% 1. The data ------------------------------------------------------------------------------------
# MS-COCO (Lin et al. 2014, arXiv 1405.0312) has 118,287 training photographs with five captions each.
# We want the rural ones, and we let the captions choose: a photograph is bucolic when people who
# described it used one of these words. A narrow subject is what lets so small a model learn it.

THEMES = {
    "bucolic": ["cow", "sheep"],
    "nature": ["cow", "sheep", "mountain", "hill", "countryside", "grass", "forest", "nature", "farm",
               "alpaca", "horse", "landscape", "fence"],
}
COCO_URL = "http://images.cocodataset.org"  # plain http: its certificate does not match its name
SIZE = 128  # pixels; smaller models average-pool the same data file
CAPTIONS = 5  # captions kept per photograph, COCO's usual number
DATA = "data/data.pt"  # where prepare writes and train reads
DATA_VERSION = 1


def word_pattern(words):
    """A regular expression that finds any of `words`, as words, in a caption.

    The report searched for substrings, so "cow" also found cowboys and scowling men. Here a match
    starts where a word starts and ends where a word ends, but for an ending that keeps the meaning:
    cows, grassy, hillside, farmland, mountainous, horseback.
    """
    stems = "|".join(re.escape(word) for word in words)
    endings = "s|es|y|ed|ous|lands?|sides?|tops?|yards?|house|back"
    return re.compile(rf"(?<!\w)(?:{stems})(?:{endings})?(?!\w)", re.IGNORECASE)


def read_captions(path, words):
    """The photographs of a COCO captions file whose captions mention one of `words`.

    Returns a list of dicts with id, file_name, url, width, height and captions, sorted by id.
    Raises Stop when the file is missing, is not COCO captions, or nothing matches.
    """
    try:
        coco = json.loads(Path(path).read_bytes())
        captions = {}
        for annotation in coco["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(str(annotation["caption"]).strip())
        photographs = [{"id": int(image["id"]), "file_name": str(image["file_name"]),
                        "url": str(image.get("coco_url", "")), "width": int(image["width"]),
                        "height": int(image["height"]), "captions": captions.get(image["id"], [])}
                       for image in coco["images"]]
    except FileNotFoundError:
        raise Stop(f"There is no captions file at {path}; --coco names COCO's folder, --split its part "
                   "(train2017, val2017).") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Stop(f"{path} is not a COCO captions file ({type(error).__name__}: "
                   f"{first_line(error)}).") from error
    for photograph in photographs:  # a name from a file is a name, not a path to follow
        name = photograph["file_name"]
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise Stop(f"{path} names the photograph {name!r}, which is not a plain file name; "
                       "nothing was fetched.")
    pattern = word_pattern(words)
    chosen = [p for p in photographs if any(pattern.search(caption) for caption in p["captions"])]
    if not chosen:
        raise Stop(f"No caption in {path} mentions any of: {', '.join(words)}.")
    return sorted(chosen, key=lambda photograph: photograph["id"])


def fetch_annotations(folder, split, base_url):
    """Fetch COCO's annotations archive and keep the captions of `split`; return their path."""
    member = f"annotations/captions_{split}.json"
    path = Path(folder) / member
    if path.exists():
        return path
    url = f"{base_url}/annotations/annotations_trainval2017.zip"
    archive = path.with_name("annotations_trainval2017.zip")

    def whole(temporary):
        if not zipfile.is_zipfile(temporary):
            raise ValueError("what arrived is no zip archive")

    try:
        with tqdm(desc="captions", unit="B", unit_scale=True) as bar:
            fetch(url, archive, whole, bar)
    except OSError as error:
        raise Stop(f"COCO's captions could not be fetched from {error.strerror or error}. Use a COCO folder "
                   "that you have (--coco DIR), a mirror (--mirror URL), or `python cvae.py demo`, which "
                   "needs no network.") from error
    try:  # take this one member out by its name; the names inside the archive are never used as paths
        with zipfile.ZipFile(archive) as bundle, atomic(path) as temporary:
            temporary.write_bytes(bundle.read(member))
    except FileNotFoundError:  # another prepare, running beside this one, was faster and has cleaned up
        pass
    except (KeyError, zipfile.BadZipFile) as error:
        raise Stop(f"{url} holds no readable {member} ({first_line(error)}).") from error
    finally:
        archive.unlink(missing_ok=True)
    return path


def decode(path, box):
    """Open a photograph as a PIL RGB image, no smaller than it takes to make a square of `box` pixels.

    Raises OSError or ValueError for whatever is not a whole, sane picture.
    """
    try:
        with Image.open(path) as photograph:
            if photograph.width * photograph.height > Image.MAX_IMAGE_PIXELS:  # Pillow itself refuses at twice that
                raise ValueError(f"{photograph.width} x {photograph.height} pixels: it could be a decompression bomb")
            photograph.draft("RGB", (box, box))  # JPEG can decode straight to 1/2, 1/4, 1/8: much faster
            photograph.load()
            if photograph.mode.startswith("I"):  # 16-bit grey: Pillow would clip it to white
                photograph = Image.fromarray((np.asarray(photograph) // 257).astype(np.uint8))
            ImageOps.exif_transpose(photograph, in_place=True)
            return photograph if photograph.mode == "RGB" else photograph.convert("RGB")
    except (Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(first_line(error)) from error


def centre_square(photograph, size):
    """The largest centred square of a PIL image, resized: uint8 tensor (3, size, size).

    CLIP and the VAE both see this crop, so the condition describes the pixels to reconstruct. The
    report squashed the whole photograph into a square for one of the two, which changes its shapes.
    """
    width, height = photograph.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = torch.from_numpy(np.array(photograph.crop((left, top, left + side, top + side))))  # (side, side, 3)
    # three times as fast on bytes as Pillow's resize
    return F.interpolate(square.permute(2, 0, 1)[None], (size, size), mode="bicubic", antialias=True)[0].contiguous()


def fetch_photographs(photographs, folder, base_url):
    """Fetch every photograph that is not in `folder` yet, sixteen at a time."""

    def check(temporary, expected):
        with Image.open(temporary) as photograph:
            if photograph.size != expected:
                raise ValueError(f"it is {photograph.size}, the annotations say {expected}")
            photograph.load()  # decodes every pixel: a truncated JPEG raises here

    def fetch_one(photograph):
        url = photograph["url"] or f"{COCO_URL}/{folder.name}/{photograph['file_name']}"
        if base_url != COCO_URL:
            url = f"{base_url}/{folder.name}/{photograph['file_name']}"
        size = photograph["width"], photograph["height"]
        fetch(url, folder / photograph["file_name"], partial(check, expected=size))

    wanted = [p for p in photographs if not (folder / p["file_name"]).exists()]
    failures = []
    pool = ThreadPoolExecutor(16)
    try:
        jobs = [pool.submit(fetch_one, photograph) for photograph in wanted]
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="photographs", disable=not jobs):
            error = job.exception()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Stop(f"The disk is full ({error.strerror}). The photographs so far are kept; free "
                           "some space and run the same command again.")
            if error is not None:
                failures.append(first_line(error))
            if len(failures) > max(10, 0.05 * len(photographs)):
                raise Stop(f"Too many photographs could not be fetched ({len(failures)}; the last: "
                           f"{failures[-1]}). Those that arrived are kept; run the same command again later.")
    finally:  # also on Ctrl-C: what has not started never does
        pool.shutdown(cancel_futures=True)
    for failure in failures:
        print(f"skipped: {failure}")


# %% 2. CLIP ----------------------------------------------------------------------------------------
# CLIP (Radford et al. 2021, arXiv 2103.00020) trained an image encoder and a text encoder together so
# that a picture and its caption point the same way: cos(image, caption) is high for a pair, low for a
# mismatch. Only directions count, so every embedding here is scaled to length one.

CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def load_clip(name, device="cpu"):
    """CLIP by model name ("ViT-B/32": fetched once to ~/.cache/clip) or by the path of its weights.

    On CUDA the model computes in half precision. Raises Stop when the weights can't be had.
    """
    with warnings.catch_warnings():  # clip imports a deprecated module; a reader need not care
        warnings.simplefilter("ignore")
        import clip
        try:
            socket.setdefaulttimeout(TIMEOUT)  # clip's own download would wait for ever
            return clip.load(name, device=device)[0]
        except (OSError, http.client.HTTPException) as error:
            raise Stop(f"The weights of CLIP {name} could not be fetched from openaipublic.azureedge.net "
                       f"({first_line(error)}). Put them in ~/.cache/clip, or name a file of weights "
                       "with --clip FILE.") from error
        except Exception as error:
            raise Stop(f"CLIP {name} could not be loaded ({first_line(error)}). --clip takes one of "
                       f"{', '.join(clip.available_models())}, or a file of CLIP weights.") from error
        finally:
            socket.setdefaulttimeout(None)


def clip_fingerprint(model):
    """A short hash of a CLIP's weights: embeddings of two different CLIPs must never be mixed."""
    return hashlib.sha256(model.text_projection.detach().cpu().half().numpy().tobytes()).hexdigest()[:16]


@torch.no_grad()
def encode_images(model, images):
    """Embed pictures with CLIP: uint8 or [0, 1] float (N, 3, H, H) -> unit vectors (N, D)."""
    resolution, embeddings = model.visual.input_resolution, []
    for part in tqdm(images.split(64), desc="CLIP, images", leave=False, disable=len(images) <= 256):
        pixels = part.float() / 255 if part.dtype == torch.uint8 else part
        if pixels.shape[-1] != resolution:
            pixels = F.interpolate(pixels, (resolution, resolution), mode="bicubic", antialias=True).clamp(0, 1)
        # CLIP was trained on pixels normalised by these constants; the report fed it raw [0, 1] values
        pixels = (pixels - CLIP_MEAN.to(pixels.device)) / CLIP_STD.to(pixels.device)
        with autocast(torch.device("cpu")):  # up to three times as fast; on CUDA, CLIP is in half precision anyway
            embeddings.append(F.normalize(model.encode_image(pixels).float(), dim=-1))
    return torch.cat(embeddings)


@torch.no_grad()
def encode_texts(model, texts):
    """Embed captions with CLIP: list of N strings -> unit vectors (N, D).

    CLIP reads at most 77 tokens, about 55 words; what lies beyond is cut.
    """
    import clip
    device = model.text_projection.device
    embeddings = []
    for start in tqdm(range(0, len(texts), 64), desc="CLIP, captions", leave=False, disable=len(texts) <= 256):
        tokens = clip.tokenize(texts[start:start + 64], model.context_length, truncate=True)    # (n, 77)
        # the end token has the largest number; CLIP reads from left to right, so the zeros that follow
        # the longest caption's end change nothing, and captions are short: most of the work is saved
        tokens = tokens[:, :int(tokens.argmax(1).max()) + 1]
        with autocast(torch.device("cpu")):
            embeddings.append(F.normalize(model.encode_text(tokens.to(device)).float(), dim=-1))
    return torch.cat(embeddings)


def decode_batch(paths, clip_size):
    """Paths -> indices of the readable ones, sentences about the others, squares for CLIP and for the VAE, uint8."""
    good, problems = [], []
    for_clip = torch.empty(len(paths), 3, clip_size, clip_size, dtype=torch.uint8)
    for_vae = torch.empty(len(paths), 3, SIZE, SIZE, dtype=torch.uint8)
    for number, path in enumerate(paths):
        try:
            photograph = decode(path, max(clip_size, SIZE))
        except (OSError, ValueError) as error:
            problems.append(f"{path}: {first_line(error)}")
            continue
        for_clip[number] = centre_square(photograph, clip_size)
        for_vae[number] = centre_square(photograph, SIZE)
        good.append(number)
    return good, problems, for_clip[good], for_vae[good]


def embed_photographs(model, paths, device, batch=32):
    """Decode photographs and embed them with CLIP, as fast as the hardware allows.

    Returns the indices of the readable ones, their pixels uint8 (M, 3, 128, 128) and their
    embeddings (M, D).
    """
    decode_some = partial(decode_batch, clip_size=model.visual.input_resolution)
    cores = torch.get_num_threads()
    pool = ThreadPoolExecutor(cores)

    def embed(decoded):
        good, problems, for_clip, for_vae = decoded
        return good, problems, for_vae, encode_images(model, for_clip.to(device)) if good else None

    if device.type == "cpu":
        # Each core works through batches of its own. Threads that share a batch wait for each other after
        # every layer, longest when one of them has just lost its core to the decoding of the next batch.
        torch.set_num_threads(1)
        batches = [paths[start:start + batch] for start in range(0, len(paths), batch)]
        embedded = pool.map(lambda some: embed(decode_some(some)), batches)
    else:  # worker processes decode ahead of the GPU; a DataLoader needs no more than a list and a collate function
        workers = max(1, min(os.cpu_count() or 1, len(paths) // batch))
        embedded = map(embed, torch.utils.data.DataLoader(paths, batch, num_workers=workers, prefetch_factor=4,
                                                          collate_fn=decode_some))
    kept, pixels, embeddings = [], [], []
    try:
        with tqdm(total=len(paths), desc="CLIP, images", unit="img") as bar:
            for good, problems, for_vae, embedding in embedded:
                for problem in problems:
                    tqdm.write(f"skipped: {problem}")
                if good:
                    kept += [bar.n + number for number in good]
                    pixels.append(for_vae)
                    embeddings.append(embedding)
                bar.update(len(good) + len(problems))
    finally:  # also on Ctrl-C: what has not started never does
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)
    if not kept:
        raise Stop("None of the photographs is there and can be read.")
    return kept, torch.cat(pixels), torch.cat(embeddings).cpu()


def prepare(args):
    """Fetch what is missing, crop, embed with CLIP, and write one data file for all trainings.

    The report ran CLIP anew for every image of every epoch; an embedding never changes, so it is
    computed once. Held-out photographs are chosen here, whole photographs with all their captions,
    so that no caption of a training picture is ever used to judge.
    """
    words = args.words or THEMES[args.theme]
    device = pick_device()
    root = Path(args.coco or "data/coco")
    captions_path = root / f"annotations/captions_{args.split}.json"
    if not args.coco:
        captions_path = fetch_annotations(root, args.split, args.mirror)
    photographs = read_captions(captions_path, words)
    folder = root / args.split
    model = load_clip(args.clip, device)  # before the long download: a mistake should show early
    if not args.coco:
        fetch_photographs(photographs, folder, args.mirror)
    on_disk = [p for p in photographs if (folder / p["file_name"]).exists()]
    print(f"{len(photographs)} photographs match {', '.join(words)}; {len(on_disk)} are in {folder}, "
          f"{len(photographs) - len(on_disk)} are missing.")
    kept, pixels, embeddings = embed_photographs(model, [folder / p["file_name"] for p in on_disk], device)
    kept = [on_disk[i] for i in kept]
    if len(kept) < 3:  # two to learn from, one held out
        raise Stop(f"{folder} holds too few of the photographs that {captions_path} describes.")
    # a photograph with fewer than five captions repeats them, one with more keeps the first five
    captions = [[p["captions"][i % len(p["captions"])] for i in range(CAPTIONS)] for p in kept]
    flat = [caption for five in captions for caption in five]
    caption_embeddings = encode_texts(model, flat).cpu()                                # (5N, D)
    # a tenth is held out, at most a thousand; the seed is fixed so that all runs share the split
    held_out = torch.zeros(len(kept), dtype=torch.bool)
    shuffled = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))
    held_out[shuffled[:min(1000, max(1, len(kept) // 10))]] = True
    save({"kind": "data file", "version": DATA_VERSION, "images": pixels, "image_embeddings": embeddings,
          "caption_embeddings": caption_embeddings.view(len(kept), CAPTIONS, -1),
          "captions": captions, "ids": torch.tensor([p["id"] for p in kept]), "held_out": held_out,
          "clip": str(args.clip), "clip_fingerprint": clip_fingerprint(model), "split": args.split,
          "words": words}, args.data)
    print(f"{args.data}: {len(kept)} photographs, {int(held_out.sum())} of them held out.")


# The gap. CLIP pulls pairs together, but only relative to mismatches: images and captions end up in two
# separate narrow cones ("Mind the gap", Liang et al. 2022, arXiv 2203.02053). A decoder trained on image
# embeddings has never seen anything like a caption's. unCLIP (arXiv 2204.06125) crosses the gap with a
# learned prior p(image embedding | caption). The smallest honest one is a line, W t + b, found by ridge
# regression in closed form. But a caption does not fix the picture, so a line is only its mean: what the
# regression could not explain is drawn from what it failed to explain for similar captions,
#
#     c = W t + b + r,      r the residual of one of the training pairs nearest to t
#
# (a residual bootstrap, local like k nearest neighbours). No distribution has to be assumed: where
# residuals come in two kinds, so do the draws, and half-way between two kinds is never drawn.

NEIGHBOURS = 16     # training pairs that a residual is drawn from
STORED_PAIRS = 2048  # pairs kept for that, spread over the training set


def fit_conditional(x, y, strength):
    """Fit p(y | x) from pairs: x (N, A) unit vectors, y (N, B), ridge strength.

    Returns the dict that draw_conditional needs: weight (A, B), bias (B,), keys (M, A), residuals (M, B).
    """
    x_mean, y_mean = x.mean(0), y.mean(0)
    covariance = (x - x_mean).T @ (x - x_mean) / len(x)                                 # (A, A)
    # W = argmin |y - x W|² + ridge |W|²  =  (XᵀX + ridge I)⁻¹ XᵀY
    ridge = strength * covariance.diagonal().mean() * torch.eye(len(covariance), device=x.device)
    weight = torch.linalg.solve(covariance + ridge, (x - x_mean).T @ (y - y_mean) / len(x))
    bias = y_mean - x_mean @ weight
    stored = torch.linspace(0, len(x) - 1, min(len(x), STORED_PAIRS), device=x.device).long()
    return {"weight": weight, "bias": bias, "keys": x[stored], "residuals": (y - x @ weight - bias)[stored]}


def draw_conditional(conditional, x, temperature=1.0):
    """Draw y | x: (N, A) -> (N, B). Temperature scales the residual; 0 gives the mean."""
    likeness = x @ conditional["keys"].T                                                # (N, M)
    nearest = likeness.topk(min(NEIGHBOURS, likeness.shape[1])).indices                 # (N, 16)
    chosen = nearest.gather(1, torch.randint(nearest.shape[1], (len(x), 1), device=x.device))[:, 0]
    return x @ conditional["weight"] + conditional["bias"] + temperature * conditional["residuals"][chosen]


def fit_prior(data):
    """Fit p(image embedding | caption) on the training pairs; choose its strength on the held-out ones.

    Returns fit_conditional's dict, and the mean cosine of held-out photographs with their captions as
    they are and with the prior's mean.
    """
    train, held = ~data["held_out"], data["held_out"]
    x = data["caption_embeddings"][train].flatten(0, 1)                                 # (5N, D), a pair each
    y = data["image_embeddings"][train].repeat_interleave(CAPTIONS, 0)                  # (5N, D)
    texts = data["caption_embeddings"][held].flatten(0, 1)                              # (5M, D)
    images = data["image_embeddings"][held].repeat_interleave(CAPTIONS, 0)              # (5M, D)
    best, best_cosine = None, -math.inf
    for strength in tqdm(torch.logspace(-5, 1, 13), desc="prior", leave=False):
        prior = fit_conditional(x, y, strength)
        predicted = F.normalize(draw_conditional(prior, texts, temperature=0), dim=-1)
        cosine = (predicted * images).sum(-1).mean().item()
        if cosine > best_cosine:
            best, best_cosine = prior, cosine
    return best, (texts * images).sum(-1).mean().item(), best_cosine


# %% 3. The model -----------------------------------------------------------------------------------
# A VAE (Kingma & Welling 2013, arXiv 1312.6114) has two halves. The encoder q(z | x, c) looks at a
# picture and says which latents z could have made it; the decoder p(x | z, c) makes a picture from
# latents. The condition c enters both, and for different reasons: the encoder needs it so that z need
# not store what c already says; the decoder needs it because at sampling time z is noise and c is all
# that it knows about the prompt.
#
# One latent vector makes fog. Where exactly each blade of grass stands is not in a 128-number z, so the
# best picture a squared error can ask for is the average over all lawns: a smear. The ladder gives each
# resolution a few latents of its own ("ladder VAE", Sonderby et al. 2016, arXiv 1602.02282; NVAE,
# 2007.03898; VDVAE, 2011.10650):
#
#     p(z | c) = p(z_0) · p(z_1 | z_0, c) · p(z_2 | z_0, z_1, c) · ...
#
# z_0 is the global vector, z_1 lives on the 8x8 grid, z_2 on 16x16, and so on to half the picture's
# size. Each level's prior is read off the decoder's own feature map, so it knows everything above; each
# posterior sees that same map and the encoder's features of its resolution. What is on the left
# and how large is settled at the top; where an edge runs is settled below, given the top.

WIDTHS = {4: 192, 8: 128, 16: 64, 32: 32, 64: 16}  # channels at each resolution: equal work at each
LATENT_DIM = 128     # numbers in the global latent z_0
LATENT_CHANNELS = 8  # channels of each spatial latent
STYLE = 256          # width of the vector that modulates the decoder


def gaussian_sample(mu, logvar, temperature=1.0):
    """The reparameterisation z = mu + sigma·e, e ~ N(0, I): randomness that gradients pass through."""
    return mu + temperature * torch.exp(0.5 * logvar) * torch.randn_like(mu)


def gaussian_kl(mu_q, logvar_q, mu_p, logvar_p):
    """KL(N(mu_q, var_q) || N(mu_p, var_p)) in nats, summed over all but the first dimension: (N,)."""
    # ½ [ log var_p - log var_q + (var_q + (mu_q - mu_p)²) / var_p - 1 ], in float32
    mu_q, logvar_q, mu_p, logvar_p = (t.float() for t in (mu_q, logvar_q, mu_p, logvar_p))
    kl = logvar_p - logvar_q + (logvar_q.exp() + (mu_q - mu_p) ** 2) / logvar_p.exp() - 1
    return 0.5 * kl.flatten(1).sum(1)


class Block(nn.Module):
    """A residual block whose feature maps the style vector scales and shifts (FiLM, arXiv 1709.07871).

    (N, C, H, H), style (N, 256) -> (N, C, H, H). Group norm, because batch norm's statistics differ
    between training and sampling; in float32, where it is more exact and its gradient is faster.
    """

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels, affine=False)
        self.film = nn.Linear(STYLE, 2 * channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h, style):
        scale, shift = self.film(style)[:, :, None, None].chunk(2, dim=1)  # (N, C, 1, 1) each
        return h + self.conv(F.silu(self.norm(h.float()) * (1 + scale) + shift))


class Level(nn.Module):
    """One rung of the decoder: double the resolution, settle this level's latent, refine.

    Each cell of the map above becomes a 2x2 patch with values of its own (sub-pixel convolution, Shi et al.
    2016, arXiv 1609.05158). Copying the cell four times would leave it to the blocks to tell the
    copies apart, and outlines drawn so are soft.
    """

    def __init__(self, channels_above, channels, latents):
        super().__init__()
        self.enlarge = nn.Conv2d(channels_above, 4 * channels, 1)
        self.before, self.after = Block(channels), Block(channels)
        if latents:
            self.prior = nn.Conv2d(channels, 2 * LATENT_CHANNELS, 3, padding=1)
            self.posterior = nn.Conv2d(2 * channels, 2 * LATENT_CHANNELS, 3, padding=1)
            self.inject = nn.Conv2d(LATENT_CHANNELS, channels, 1)
            for head in (self.prior, self.posterior):  # at first both are N(0, 1) and the KL is zero
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)


class CVAE(nn.Module):
    """The ladder CVAE; with latents="flat", the same network with the global latent alone.

    size: pixels, 64 or 128. condition_dim: D of the embeddings. dropout: on z_0, as in the report.
    """

    def __init__(self, size, condition_dim, latents="ladder", dropout=0.0):
        super().__init__()
        self.ladder = latents == "ladder"
        sides = [side for side in WIDTHS if side < size]  # 4, 8, ... size / 2
        self.register_buffer("awake", torch.zeros(len(sides) - 1))  # which levels count yet (see train)
        # embeddings crowd into a narrow cone; standardised, their differences are what the network sees
        self.register_buffer("condition_mean", torch.zeros(condition_dim))
        self.register_buffer("condition_std", torch.ones(condition_dim))
        widths = [3] + [WIDTHS[side] for side in reversed(sides)]  # 3 -> 32 -> 64 -> 128 -> 192
        self.down = nn.ModuleList(
            nn.Conv2d(above, width, 4, stride=2, padding=1) for above, width in zip(widths, widths[1:]))
        self.norm = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:])
        self.to_hidden = nn.Linear(WIDTHS[4] * 16 + condition_dim, 512)
        self.to_latent = nn.Linear(512, 2 * LATENT_DIM)
        self.dropout = nn.Dropout(dropout)
        self.to_style = nn.Linear(LATENT_DIM + condition_dim, STYLE)
        self.to_grid = nn.Linear(LATENT_DIM + condition_dim, WIDTHS[4] * 16)
        self.top = Block(WIDTHS[4])
        self.levels = nn.ModuleList(
            Level(WIDTHS[above], WIDTHS[side], self.ladder) for above, side in zip(sides, sides[1:]))
        self.to_pixels = nn.Conv2d(WIDTHS[sides[-1]], 3 * 4, 3, padding=1)

    def standardise(self, condition):
        """Embeddings as CLIP gives them -> zero mean, unit variance over the training set: (N, D)."""
        return (condition - self.condition_mean) / self.condition_std

    def encode(self, x, condition):
        """q(z_0 | x, c) and the features for the levels below.

        x (N, 3, S, S) in [0, 1], condition (N, D) -> mu (N, 128), logvar (N, 128), {side: features}.
        """
        h, features = x * 2 - 1, {}
        for conv, norm in zip(self.down, self.norm):
            h = F.silu(norm(conv(h).float()))               # (N, C, S/2, S/2), then S/4, ... 4
            features[h.shape[-1]] = h
        h = torch.cat([h.flatten(1), self.standardise(condition)], dim=1)   # first entry of the condition
        mu, logvar = self.to_latent(F.silu(self.to_hidden(h))).chunk(2, dim=1)
        return mu, logvar.clamp(-10, 10), features

    def decode(self, z, condition, features=None, given=(), temperature=1.0):
        """Walk down the ladder. z (N, 128), condition (N, D) -> picture, [KL per level], [latents].

        Where a level's latent comes from: the posterior, if the encoder's features are given (that
        is training); else `given`, as far as the list reaches; else the prior.
        """
        h = torch.cat([self.dropout(z), self.standardise(condition)], dim=1)  # second entry
        style = F.silu(self.to_style(h))                                      # (N, 256)
        h = self.top(self.to_grid(h).view(-1, WIDTHS[4], 4, 4), style)        # (N, 192, 4, 4)
        kls, latents = [], []
        for index, level in enumerate(self.levels):
            h = F.pixel_shuffle(level.enlarge(h), 2)                          # (N, C, 8, 8), 16, ...
            h = level.before(h, style)
            if self.ladder:
                seen = F.silu(h)
                mu_p, logvar_p = level.prior(seen).chunk(2, dim=1)            # (N, 8, H, H) each
                logvar_p = logvar_p.clamp(-8, 4)
                if features is not None:
                    # the posterior is a correction of the prior (NVAE): doing nothing costs nothing
                    seen = torch.cat([seen, features[h.shape[-1]]], dim=1)
                    mu_d, logvar_d = level.posterior(seen).chunk(2, dim=1)
                    mu_q, logvar_q = mu_p + mu_d, (logvar_p + logvar_d).clamp(-10, 4)
                    latent = gaussian_sample(mu_q, logvar_q)
                    kls.append(gaussian_kl(mu_q, logvar_q, mu_p, logvar_p))
                elif index < len(given):
                    latent = given[index]
                else:
                    latent = gaussian_sample(mu_p, logvar_p, temperature)
                latents.append(latent)
                h = h + level.inject(self.awake[index] * latent)
            h = level.after(h, style)
        # the last doubling: each pixel of the map becomes a 2x2 patch of the picture
        picture = torch.sigmoid(F.pixel_shuffle(self.to_pixels(F.silu(h)).float(), 2))  # (N, 3, S, S)
        return picture, kls, latents

    def forward(self, x, condition):
        """Reconstruct: x (N, 3, S, S), condition (N, D) -> picture (N, 3, S, S), KL (N, levels) in nats."""
        mu, logvar, features = self.encode(x, condition)
        picture, kls, _ = self.decode(gaussian_sample(mu, logvar), condition, features)
        zero = torch.zeros_like(mu)
        return picture, torch.stack([gaussian_kl(mu, logvar, zero, zero), *kls], dim=1)

    @torch.no_grad()
    def generate(self, condition, latent_prior, temperature=1.0):
        """Draw pictures: condition (N, D) -> (N, 3, S, S), z_0 from latent_prior, the ladder from its own.

        Temperature scales the ladder's noise, not z_0's: z_0 decides what stands where, and half a
        decision is a ghost.
        """
        pictures = []
        for part in condition.split(64):  # few enough at a time for any memory
            z = draw_conditional(latent_prior, part)                                    # (n, 128)
            pictures.append(self.decode(z, part, temperature=temperature)[0])
        return torch.cat(pictures)


def build_model(config):
    """The network that a run's configuration describes."""
    return CVAE(config["size"], config["condition_dim"], config["latents"], config["dropout"])


# %% 4. The objective -------------------------------------------------------------------------------
# We want parameters under which the photographs are likely: log p(x | c) = log ∫ p(x | z, c) p(z | c) dz.
# The integral is out of reach, so bound it from below (Jensen's inequality, with any q):
#
#     log p(x|c)  >=  E_q [ log p(x | z, c) ]  -  KL( q(z | x, c) || p(z | c) )  =  ELBO
#
# the first term asks for good reconstructions, the second for latents that the prior could have drawn.
# With the ladder, p and q are products over levels, so the KL is a sum over levels.
#
# Likelihood. p(x | z, c) is a Gaussian around the decoder's picture x̂ with one variance s² for all D
# values. A fixed s is a hidden weight between the two terms (the "beta" that is usually tuned by hand).
# The best s² for a batch is its mean squared error, and putting it in gives ("sigma-VAE", Rybkin et al.
# 2021, arXiv 2006.13202):
#
#     -log p(x | z, c) = D/2 log(2 pi s²) + |x - x̂|² / 2s²  =  D/2 log(2 pi e MSE)    at  s² = MSE
#
# so small errors keep mattering: halving the MSE is worth the same number of nats at any quality.
#
# Units. Pixels are 256 levels, not real numbers, and a density may exceed 1 without meaning anything. The
# standard remedy is to spread each level uniformly over its own width of 1/256 (dequantisation); that
# noise adds 1/(12·256²) to the expected MSE, and minus the ELBO is then a bound on the bits per level:
#
#     bits per dimension = (NLL + KL) / (D log 2) + log2(256)

QUANTISATION = 1 / (12 * 256**2)


def gaussian_nll(mse, dimensions):
    """-log p(x | z, c) in nats of a Gaussian with its best variance; mse includes QUANTISATION."""
    return 0.5 * dimensions * torch.log(2 * math.pi * math.e * mse)


def bits_per_dimension(nats, dimensions):
    """Nats per picture on [0, 1] pixels -> bits per 256-level value."""
    return nats / (dimensions * math.log(2)) + 8


def elbo_loss(picture, x, kl):
    """Minus the ELBO, in bits per dimension, averaged over the batch: a scalar."""
    dimensions = x[0].numel()
    mse = F.mse_loss(picture.float(), x) + QUANTISATION
    return bits_per_dimension(gaussian_nll(mse, dimensions) + kl.sum(1).mean(), dimensions)


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of pictures (N, 3, S, S) in [0, 1]: (N,)."""
    ramp = torch.exp(-0.5 * ((torch.arange(11, device=a.device) - 5) / 1.5) ** 2)
    window = (ramp[:, None] * ramp / ramp.sum() ** 2).expand(3, 1, 11, 11)

    def blur(t):
        return F.conv2d(t, window, groups=3)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)
            / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).flatten(1).mean(1)


def original_loss(picture, x, kl):
    """The report's loss: BCE summed over pixels, averaged over channels, + 0.5 KL + 0.1 (1 - SSIM).

    Cross-entropy on values that are not 0 or 1 is no likelihood. Near the target it curves like a
    Gaussian with s = sqrt(x (1 - x)), up to 0.5: as if half the brightness range were noise. Under so
    much noise hardly any latent is worth its KL, so the latents go unused and the pictures to fog.
    """
    bce = F.binary_cross_entropy(picture.float(), x, reduction="none").sum((1, 2, 3)) / 3
    return (bce + 0.5 * kl.sum(1) + 0.1 * (1 - ssim(picture.float(), x)) / len(x)).mean()


OBJECTIVES = {"elbo": elbo_loss, "original": original_loss}

# %% 5. Training ------------------------------------------------------------------------------------
# All pictures fit in memory as bytes (20,000 at 128 pixels are 1 GB), so there is no DataLoader: the
# whole uint8 tensor lives on the device and a batch is an index into it. Nothing in the loop waits for
# the GPU except the progress bar's read-out, every 20 steps.
#
# All randomness of step n comes from a generator seeded with (seed, n). So a run is determined by its
# configuration, and resuming needs no more than weights, optimiser state and n.

CHECKPOINT_VERSION = 2
# The ladder sleeps at first. Left to itself it learns from the bottom: fine levels can copy a picture
# detail by detail, so they do, and nothing makes z_0 and the condition say what stands where. Reconstructions
# are then superb and samples are fog. So at first only z_0 counts (a flat VAE), and it learns what stands
# where; then the levels wake one by one, coarse before fine, and each adds what those above can't hold.
# (The ladder VAE warms up its KL for the same reason, Sonderby et al. 2016.)
WAKES = [0.3, 0.4, 0.5, 0.6]  # of all steps: when the 8x8, 16x16, 32x32 and 64x64 latents begin to count

WARM_UP = 50  # steps: the learning rate rises over these, and throughput is measured after them


def load_data(path):
    """The data file that `prepare` wrote, memory-mapped."""
    if not Path(path).exists():
        raise Stop(f"There is no data file at {path}; make one first: python cvae.py prepare")
    return load(path, "data file", DATA_VERSION)


def pool_images(images, size):
    """uint8 (N, 3, 128, 128) -> uint8 (N, 3, size, size), by averaging."""
    if images.shape[-1] == size:
        return images
    factor = images.shape[-1] // size
    return torch.cat([F.avg_pool2d(some.float(), factor).round().byte() for some in images.split(1024)])


def to_device(images, device):
    """Put the whole tensor on the device; if it would take over half of the free memory, keep it in RAM."""
    if device.type == "cuda" and images.nbytes > 0.5 * torch.cuda.mem_get_info()[0]:
        print(f"{images.nbytes / 1e9:.1f} GB of pictures stay in host memory; batches are copied as needed.")
        return images
    return images.to(device)


def take(images, index, device):
    """Pictures by index as floats in [0, 1], channels last: (n, 3, S, S)."""
    batch = images[index.to(images.device)]
    if batch.device != device:  # page-locked host memory, so that the copy runs beside the arithmetic
        batch = batch.pin_memory().to(device, non_blocking=True)
    return (batch.float() / 255).contiguous(memory_format=torch.channels_last)


def conditions_of(data, kind):
    """What the model is conditioned on: image embeddings (N, 1, D) or the captions' (N, 5, D)."""
    return data["image_embeddings"][:, None] if kind == "image" else data["caption_embeddings"]


@torch.no_grad()
def evaluate_elbo(model, images, conditions, device, objective=elbo_loss):
    """Held-out figures: dict with held_out_loss, bpd, kl (nats), kl_levels (list) and psnr (dB).

    images uint8 (N, 3, S, S), conditions (N, D). The Gaussian's one variance is its best over the
    whole set, for either objective, so the figures compare.
    """
    model.eval()
    torch.manual_seed(0)  # the same posterior noise at every call
    squares, kl, loss = 0.0, 0.0, 0.0
    for index in torch.arange(len(images), device=device).split(64):
        x = take(images, index, device)
        with autocast(device):
            picture, kls = model(x, conditions[index])
        squares += (picture.float() - x).square().sum().double()
        kl += kls.sum(0).double()
        loss += objective(picture, x, kls).double() * len(x) / len(images)
    dimensions = images[0].numel()
    mse = squares / (len(images) * dimensions)
    kl = kl / len(images)
    nats = gaussian_nll(mse + QUANTISATION, dimensions) + kl.sum()
    return {"held_out_loss": loss.item(), "bpd": bits_per_dimension(nats, dimensions).item(), "kl": kl.sum().item(),
            "kl_levels": kl.tolist(), "psnr": -10 * torch.log10(mse).item()}


@torch.no_grad()
def fit_latent_prior(model, images, conditions, device):
    """Fit p(z_0 | c) to what the encoder does with (up to 1,024) training pictures: fit_conditional's dict.

    Training pulls every q(z_0 | x, c) towards N(0, I), but their mixture over all pictures stays
    off-centre, correlated, and dependent on c. Draws of N(0, I) land where no picture ever was, and
    the decoder answers with grey mush. The best prior is that mixture itself ("VampPrior", Tomczak &
    Welling 2018, arXiv 1705.07120; "Exemplar VAE", Norouzi et al. 2020, arXiv 2004.04795). Ours is
    section 2's line through it, with residuals of pictures whose conditions are alike.
    """
    model.eval()
    torch.manual_seed(0)
    latents, used = [], conditions[:1024, 0]                                            # (n, D)
    for index in torch.arange(len(used), device=device).split(64):
        mu, logvar, _ = model.encode(take(images, index, device), used[index])
        latents.append(gaussian_sample(mu, logvar))
    return fit_conditional(used, torch.cat(latents), strength=0.3)


def learning_rate(step, total, peak):
    """Linear warm-up, a plateau, and a linear descent to zero over the last 40% of the steps.

    The plateau is for the levels: under a cosine, the finest would wake when half of the rate is gone.
    """
    return peak * min(1, (step + 1) / WARM_UP, (total - step) / (0.4 * total))


def arithmetic_per_image(model, x, condition):
    """Floating-point operations of one training step per image, counted by PyTorch."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        picture, kl = model(x, condition)
        elbo_loss(picture, x, kl).backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(x)


def peak_memory(device):
    """The most memory used so far, in GB: the GPU's if there is one, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def compiled(model, x, condition):
    """The model compiled by torch.compile on CUDA, proven by one call; the model itself where it can't be."""
    if x.device.type != "cuda":
        return model
    torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32
    try:
        forward = torch.compile(model)
        with autocast(x.device):
            picture, kl = forward(x, condition)
        elbo_loss(picture, x, kl).backward()  # the backward pass is compiled when it first runs
        return forward
    except Exception as error:  # no C compiler, no Triton, ...: the lesson goes on, slower
        print(f"torch.compile can't be used here ({first_line(error)}); training goes on without it.")
        return model
    finally:
        model.zero_grad()  # also where the backward pass broke off half-way


def save_grid(path, rows, labels):
    """Draw rows of pictures, each (n, 3, S, S) in [0, 1], with a label above each row, as a PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    width = max(1.35 * max(len(row) for row in rows), 4)  # inches
    height = 1.35 + 0.3
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # an emoji has no glyph: a box will do
        figure, axes = plt.subplots(len(rows), squeeze=False, figsize=(width, height * len(rows)))
        for axis, row, label in zip(axes[:, 0], rows, labels):
            strip = F.pad(row.float().cpu(), (2, 2, 2, 2), value=1.0)         # (n, 3, S+4, S+4)
            axis.imshow(strip.permute(2, 0, 3, 1).flatten(1, 2).numpy())      # side by side
            limit = int(14 * width)
            axis.set_title(label if len(label) <= limit else label[:limit] + " ...", fontsize=9,
                           loc="left", pad=3, parse_math=False)
            axis.axis("off")
            axis.set_anchor("W")
        figure.tight_layout(pad=0.3)
        with atomic(path) as temporary:
            # a quarter of the time for a fifth more bytes: a picture is written after every epoch
            figure.savefig(temporary, dpi=150, format="png", pil_kwargs={"compress_level": 1})
        plt.close(figure)


def save_curves(path, history):
    """Draw the training loss and the held-out figures, epoch by epoch."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
    epochs = range(1, len(history) + 1)
    for axis, names, title in ((left, ("train_loss", "held_out_loss"), "loss"), (right, ("bpd",), "bits per dimension")):
        for name in names:
            axis.plot(epochs, [h[name] for h in history], "o-", markersize=3, label=name.replace("_", " "))
        axis.set(xlabel="epoch", title=title)
        axis.legend()
    figure.tight_layout()
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


def save_progress(path, model, data, prior, latent_prior, config, device):
    """After every epoch: the same held-out photographs reconstructed, the same captions sampled."""
    chosen = data["held_out"].nonzero()[:8, 0]                                          # (8,)
    x = pool_images(data["images"][chosen], config["size"]).to(device) / 255
    model.eval()
    torch.manual_seed(0)
    with torch.no_grad(), autocast(device):
        reconstructions = model(x, conditions_of(data, config["condition"])[chosen, 0].to(device))[0]
    rows, labels = [x, reconstructions], ["held-out photographs", "their reconstructions"]
    for number in chosen[:3].tolist():
        torch.manual_seed(0)
        text = data["caption_embeddings"][number, :1].expand(8, -1)                     # (8, D)
        rows.append(model.generate(text_conditions(text, prior).to(device), latent_prior, TEMPERATURE))
        labels.append(data["captions"][number][0])
    save_grid(path, rows, labels)


def load_checkpoint(path):
    """A checkpoint of a run: configuration, prior, weights and, in last.pt, all that resuming needs."""
    return load(path, "checkpoint", CHECKPOINT_VERSION)


def newest_run(name):
    """The run folder whose file `name` is the youngest."""
    files = sorted(Path("runs").glob(f"*/{name}"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise Stop("There is no trained model in runs/ yet; train one first: python cvae.py train")
    return files[-1].parent


def train(args):
    """Train a model on a data file; write a run folder with best.pt, last.pt, loss.png and epoch.png.

    The run's configuration is stored in its checkpoints, so --resume needs no other option. Raises
    Stop when the loss becomes NaN, KeyboardInterrupt (after saving) on Ctrl-C.
    """
    if args.resume:
        run = Path(args.run or newest_run("last.pt"))
        checkpoint = load_checkpoint(run / "last.pt")
        config = checkpoint["config"]
    else:
        run = Path(args.run or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{args.size}-{args.latents}")
        if (run / "last.pt").exists():
            raise Stop(f"{run} already holds a run. Continue it with --resume, or choose another --run.")
        names = ["data", "size", "latents", "condition", "objective", "dropout", "epochs", "batch", "lr", "seed"]
        config = {name: getattr(args, name) for name in names}
    data = load_data(config["data"])
    facts = {"condition_dim": data["image_embeddings"].shape[-1], "clip": data["clip"],
             "clip_fingerprint": data["clip_fingerprint"], "photographs": len(data["images"])}
    if args.resume and any(config[name] != fact for name, fact in facts.items()):
        raise Stop(f"{config['data']} is not the data that {run} was trained on (other photographs or another "
                   "CLIP); a run can't change its data on the way.")
    config |= facts
    device = pick_device()
    held = data["held_out"]
    images = to_device(pool_images(data["images"][~held], config["size"]), device)     # uint8 (N, 3, S, S)
    held_images = to_device(pool_images(data["images"][held], config["size"]), device)
    conditions = conditions_of(data, config["condition"])[~held].to(device)            # (N, 1 or 5, D)
    held_conditions = conditions_of(data, config["condition"])[held][:, 0].to(device)  # (M, D)
    batch = min(config["batch"], len(images))  # fewer photographs than a batch still train
    epoch_steps = len(images) // batch
    total = config["epochs"] * epoch_steps

    torch.manual_seed(config["seed"])
    model = build_model(config).to(device, memory_format=torch.channels_last)
    model.condition_mean.copy_(conditions.mean((0, 1)))
    model.condition_std.copy_(conditions.flatten(0, 1).std(0) + 1e-6)
    forward = compiled(model, take(images, torch.arange(batch, device=device), device), conditions[:batch, 0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"], betas=(0.9, 0.99), weight_decay=0.01,
                                  fused=True)  # one pass over all weights: a fifth of a CPU step saved
    objective = OBJECTIVES[config["objective"]]
    wakes = torch.tensor(WAKES[:len(model.awake)], device=device)
    step, running, best, history, latent_prior = 0, 0.0, math.inf, [], None
    if args.resume:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step, running, best, history, prior, latent_prior = (checkpoint[name] for name in (
            "step", "running", "best", "history", "prior", "latent_prior"))
    elif config["condition"] == "image":
        prior, cosine_without, cosine = fit_prior(data)
        print(f"prior: cosine of held-out captions with their photographs {cosine_without:.3f}, "
              f"through the prior {cosine:.3f}")
    else:
        prior = None  # a model conditioned on captions needs no bridge

    def save_checkpoint(name):
        content = {"kind": "checkpoint", "version": CHECKPOINT_VERSION, "config": config, "prior": prior,
                   "latent_prior": latent_prior, "model": model.state_dict(), "history": history}
        if name == "last.pt":  # what resuming needs, and sampling does not
            content |= {"optimizer": optimizer.state_dict(), "step": step, "running": float(running), "best": best}
        save(content, run / name)

    def must_be_finite(value):
        if not math.isfinite(value):
            raise Stop(f"The loss became NaN near step {step}. {run} keeps its last good checkpoint; start "
                       f"anew with a lower rate, such as --lr {config['lr'] / 2:g}.")

    print(f"{run}: {len(images)} photographs, {len(held_images)} held out, {config['size']} pixels, "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters, {device}")
    interrupted = []  # Ctrl-C only leaves a note here: the step is finished first
    previous_handler = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    seconds, seen = 0.0, 0  # for the throughput after warm-up
    try:
        while step < total:
            model.train()
            epoch = step // epoch_steps
            shuffle = torch.Generator().manual_seed(config["seed"] * 1000 + epoch)
            order = torch.randperm(len(images), generator=shuffle).to(images.device)
            bar = tqdm(total=epoch_steps * batch, initial=step % epoch_steps * batch, unit="img", leave=False,
                       desc=f"epoch {epoch + 1}/{config['epochs']}")
            mark, marked = time.perf_counter(), step
            while step < (epoch + 1) * epoch_steps and not interrupted:
                torch.manual_seed(config["seed"] * 1_000_003 + step)
                model.awake.copy_(step >= wakes * total)
                index = order[step % epoch_steps * batch:][:batch]
                x = take(images, index, device)                                        # (n, 3, S, S)
                # one of the captions, drawn anew at every visit (with image embeddings: the only one)
                which = torch.randint(conditions.shape[1], (batch,), device=device)
                with autocast(device):
                    picture, kl = forward(x, conditions[index.to(device), which])
                loss = objective(picture, x, kl)  # in float32
                loss.backward()
                if config["objective"] == "elbo":  # the report did not clip
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, total, config["lr"])
                optimizer.step()
                optimizer.zero_grad()
                running = running + loss.detach()
                step += 1
                bar.update(batch)
                if step % 20 == 0 or step % epoch_steps == 0 or interrupted:
                    mean_loss = float(running) / ((step - 1) % epoch_steps + 1)  # waits for the device
                    must_be_finite(mean_loss)
                    bar.set_postfix(loss=f"{mean_loss:.3f}")
                    if marked >= WARM_UP:
                        seconds, seen = seconds + time.perf_counter() - mark, seen + (step - marked) * batch
                    mark, marked = time.perf_counter(), step
            bar.close()
            if step % epoch_steps == 0:  # the epoch is complete
                figures = evaluate_elbo(model, held_images, held_conditions, device, objective)
                must_be_finite(figures["bpd"])
                history.append({"train_loss": mean_loss, **figures})
                latent_prior = fit_latent_prior(model, images, conditions, device)
                running = 0.0
                if figures["held_out_loss"] < best:
                    best = figures["held_out_loss"]
                    save_checkpoint("best.pt")
                print(f"epoch {epoch + 1}: training loss {mean_loss:.3f}, held-out {figures['held_out_loss']:.3f}, "
                      f"{figures['bpd']:.3f} bits/dim, KL {figures['kl']:.0f} nats, PSNR {figures['psnr']:.1f} dB")
                save_curves(run / "loss.png", history)
                save_progress(run / "epoch.png", model, data, prior, latent_prior, config, device)
            save_checkpoint("last.pt")
            if interrupted and step < total:
                raise KeyboardInterrupt(f"Stopped at step {step} of {total}, nothing is lost. Go on with: "
                                        f"python cvae.py train --resume --run {run}")
    finally:
        signal.signal(signal.SIGINT, previous_handler)
    work = arithmetic_per_image(model, take(images, torch.arange(2, device=device), device), conditions[:2, 0])
    speed = f"{seen / seconds:.0f} images/s after warm-up" if seen else "too short a run to measure images/s"
    print(f"{run}: {speed}, {peak_memory(device):.1f} GB peak memory, {work / 1e9:.2f} GFLOP per image and step")


# %% 6. Sampling ------------------------------------------------------------------------------------
# A prompt becomes a condition in three steps: CLIP's text encoder, the prior, and guidance. Then the
# ladder draws: z_0, each level's latents, and the picture is the mean of p(x | z, c).


def checkpoint_path(name):
    """The checkpoint that the user named, by its file or its run folder; by default the newest run's best."""
    path = Path(name) if name else newest_run("best.pt")
    return path / "best.pt" if path.is_dir() else path


def load_model(path, device):
    """A trained model, ready to sample: model, its configuration, its two priors."""
    checkpoint = load_checkpoint(path)
    model = build_model(checkpoint["config"])
    model.load_state_dict(checkpoint["model"])
    priors = [gaussian and {name: part.to(device) for name, part in gaussian.items()}
              for gaussian in (checkpoint["prior"], checkpoint["latent_prior"])]
    return model.to(device, memory_format=torch.channels_last).eval(), checkpoint["config"], *priors


def load_clip_of(config, device, name=None):
    """The CLIP that a run was trained with. Raises Stop when `name` is another one."""
    clip_model = load_clip(name or config["clip"], device)
    if clip_fingerprint(clip_model) != config["clip_fingerprint"]:
        raise Stop(f"{name or config['clip']} is not the CLIP that this model was trained with "
                   f"({config['clip']}); its embeddings mean something else.")
    return clip_model


TEMPERATURE = 0.6  # scales noise: 1 shows all the variety that the model believes in, mistakes included


def text_conditions(texts, prior, temperature=TEMPERATURE):
    """Caption embeddings (N, D) -> conditions (N, D): through the prior, if there is one to cross."""
    return F.normalize(draw_conditional(prior, texts, temperature), dim=-1) if prior else texts


def guide(model, condition, guidance):
    """Push conditions away from the average photograph, so that the prompt counts for more.

    The analogue of classifier-free guidance (as in GLIDE and unCLIP): 1 changes nothing.
    """
    return model.condition_mean + guidance * (condition - model.condition_mean)


def slerp(a, b, steps):
    """Points on the arc from vector a (D,) to b (D,): (steps, D). Embeddings live on a sphere; a chord
    would cut through its inside, where the model has never been."""
    angle = torch.arccos(F.cosine_similarity(a, b, dim=0).clamp(-1, 1)).clamp(min=1e-4)
    t = torch.linspace(0, 1, steps, device=a.device)[:, None]
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def sample_path(folder, label):
    """A new file name in `folder` made of the label's letters and digits, and of nothing else."""
    name = re.sub(r"[^a-z0-9]+", "-", label.lower())[:60].strip("-") or "sample"
    path, number = Path(folder) / f"{name}.png", 2
    while path.exists():
        path, number = Path(folder) / f"{name}-{number}.png", number + 1
    return path


def check_prompts(prompts, context_length):
    """Refuse empty prompts; say when CLIP will not read one to its end."""
    import clip
    for prompt in prompts:
        if not prompt.strip():
            raise Stop("A prompt is empty; say what the picture should show.")
        try:
            clip.tokenize([prompt], context_length)
        except RuntimeError:
            print(f"CLIP reads {context_length} tokens; this prompt is longer and was cut: {prompt[:60]}...")


@torch.no_grad()
def sample(args):
    """Draw pictures for prompts (or from a photograph, or between two prompts); write a captioned grid."""
    device = pick_device()
    model, config, prior, latent_prior = load_model(checkpoint_path(args.checkpoint), device)
    if not args.prompts and not args.image:
        raise Stop('Say what to draw: python cvae.py sample "sheep on a hill", or --image FILE.')
    if args.interpolate and (len(args.prompts) != 2 or args.image):
        raise Stop("--interpolate goes from one prompt to another: give exactly two, and no --image.")
    if args.no_prior:
        prior = None
    clip_model = load_clip_of(config, device, args.clip)
    check_prompts(args.prompts, clip_model.context_length)
    targets = []  # one per row: what to draw, as an embedding (1, D)
    if args.image:
        try:
            photograph = decode(args.image, clip_model.visual.input_resolution)
        except (OSError, ValueError) as error:
            raise Stop(f"{args.image} is no picture that can be read ({first_line(error)}).") from error
        square = centre_square(photograph, clip_model.visual.input_resolution)[None].to(device)
        targets.append((f"variations of {Path(args.image).name}", encode_images(clip_model, square), None))
    if args.prompts:
        embeddings = encode_texts(clip_model, args.prompts)
        targets += [(prompt, text[None], prior) for prompt, text in zip(args.prompts, embeddings)]

    rows, labels = [], []
    if args.interpolate:
        torch.manual_seed(args.seed)
        ends = guide(model, text_conditions(embeddings, prior, args.temperature), args.guidance)  # (2, D)
        arc = slerp(*ends, args.n)                                                      # (n, D)
        z = draw_conditional(latent_prior, arc[[args.n // 2]])                          # (1, 128), for half-way
        for condition in arc:
            torch.manual_seed(args.seed)  # the same noise in every column: only the condition changes
            rows.append(model.decode(z, condition[None], temperature=args.temperature)[0])
        rows, labels = [torch.cat(rows)], [" → ".join(args.prompts)]
    else:
        count = max(args.n, args.rerank)
        for label, target, bridge in tqdm(targets, desc="sampling", leave=False):
            torch.manual_seed(args.seed)  # anew for each row: a prompt's row does not depend on its neighbours
            condition = text_conditions(target.expand(count, -1), bridge, args.temperature)
            pictures = model.generate(guide(model, condition, args.guidance), latent_prior, args.temperature)
            if args.rerank:  # keep those that CLIP finds closest to what was asked, as DALL-E did
                scores = encode_images(clip_model, pictures) @ target[0]
                pictures = pictures[scores.topk(args.n).indices]
            rows.append(pictures)
            labels.append(label)
    path = sample_path(args.out, " ".join(labels))
    save_grid(path, rows, labels)
    print(path)


# %% 7. Evaluation ----------------------------------------------------------------------------------
# A loss says how well pictures are stored, not how well prompts are answered. unCLIP asked people three
# questions; we ask CLIP the same ones, always about captions and photographs that were held out:
#
#     does the picture show the caption?   CLIP score, and R-precision: of 100 captions, is its own nearest?
#     do samples of one caption differ?    mean distance between their CLIP embeddings
#     do they look like photographs?       CMMD, a distance between two sets of embeddings
#
# Figures that CLIP gives need a yardstick, so real photographs answer the same questions beside them.


def diversity(embeddings):
    """Mean cosine distance over all pairs of unit vectors (N, D)."""
    n = len(embeddings)
    return ((1 - embeddings @ embeddings.T).sum() / (n * (n - 1))).item()


def cmmd(a, b):
    """CMMD (Jayasumana et al. 2024, arXiv 2401.09603) of two sets of unit vectors (N, D), (M, D).

    1000 · MMD² with the kernel exp(-|u - v|² / 2σ²), σ = 10: zero if and only if the distributions agree.
    """

    def kernel(u, v):
        return torch.exp(-torch.cdist(u.double(), v.double()).square() / (2 * 10**2)).mean()

    return 1000 * (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)).item()


def hundred_captions(data):
    """A hundred different held-out captions, or as many as there are: {caption: photograph's index}."""
    chosen = {}
    for k in range(CAPTIONS):  # everyone's first caption, then, if those are too few, their second, ...
        for number in data["held_out"].nonzero()[:, 0].tolist():
            if len(chosen) < 100:
                chosen.setdefault(data["captions"][number][k], number)
    return chosen


def save_levels(path, model, x, condition, latent_prior):
    """Show what each level holds: keep the upper levels' latents of photographs x, draw the rest anew."""
    torch.manual_seed(0)
    mu, _, features = model.encode(x, condition)
    _, _, latents = model.decode(mu, condition, features)     # [(n, 8, 8, 8), (n, 8, 16, 16), ...]
    rows, labels = [x], ["held-out photographs"]
    for kept in range(len(latents) + 1):
        rows.append(model.decode(mu, condition, given=latents[:kept])[0])
        sides = [4] + [latent.shape[-1] for latent in latents]
        labels.append(f"kept: the global latent{''.join(f', {side}x{side}' for side in sides[1:kept + 1])}")
    rows.insert(1, model.generate(condition, latent_prior))
    labels.insert(1, "kept: nothing but the condition")
    save_grid(path, rows, labels)


def caption_match(images, texts, own):
    """CLIP score (100 · cosine) and R-precision of embedded pictures (N, D) whose caption is texts[own]."""
    cosines = images @ texts.T                                                          # (N, captions)
    score = 100 * cosines.gather(1, own[:, None]).mean().item()
    return {"CLIP score": score, "R-precision": (cosines.argmax(1) == own).float().mean().item()}


@torch.no_grad()
def evaluate(args):
    """Measure a run on held-out photographs and captions; print a table.

    Writes evaluation.json, reconstructions.png and levels.png into the run's folder.
    """
    device = pick_device()
    path = checkpoint_path(args.checkpoint)
    model, config, prior, latent_prior = load_model(path, device)
    data = load_data(config["data"])
    if (data["clip_fingerprint"], len(data["images"])) != (config["clip_fingerprint"], config["photographs"]):
        raise Stop(f"{config['data']} is not the data that {path} was trained on.")
    clip_model = load_clip_of(config, device, args.clip)
    held, size = data["held_out"], config["size"]
    images = pool_images(data["images"][held], size).to(device)                         # uint8 (M, 3, S, S)
    conditions = conditions_of(data, config["condition"])[held][:, 0].to(device)        # (M, D)
    storage = evaluate_elbo(model, images, conditions, device)

    # photographs are judged at the model's own size, or their sharpness would be what sets them apart
    held_real = encode_images(clip_model, images)                                       # (M, D)
    train_real = encode_images(clip_model, pool_images(data["images"][~held][:len(images)], size).to(device))
    captions = hundred_captions(data)
    texts = encode_texts(clip_model, list(captions))                                    # (100, D)
    photographs = pool_images(data["images"][list(captions.values())], size).to(device)
    table = {"photographs": caption_match(encode_images(clip_model, photographs), texts,
                                          torch.arange(len(texts), device=device))}
    table["photographs"]["diversity"] = diversity(held_real)  # of all; lower among those of one caption:
    first = [data["captions"][number][0] for number in held.nonzero()[:, 0].tolist()]
    same = torch.tensor([[a == b for b in first] for a in first], device=device).fill_diagonal_(False)
    if same.any():
        table["photographs"]["diversity"] = (1 - held_real @ held_real.T)[same].mean().item()
    table["photographs"]["CMMD"] = cmmd(train_real, held_real)  # what a perfect model would get
    # in the toy world we know what was never drawn: is a sample's nearest of all 36 prompts its own?
    scenes = [(animal, ground, sky) for animal in SUBJECTS for ground in GROUNDS for sky in SKIES]
    unseen = torch.tensor([scenes.index(scene) for scene in UNSEEN], device=device).repeat_interleave(8)
    if data["split"] == "toy":
        prompts = encode_texts(clip_model, [caption_scene(*scene) for scene in scenes])  # (36, D)
        fresh = [centre_square(draw_pasture((*scenes[i], "hills", 1, "left"), TOY_IMAGES + seed), SIZE)
                 for seed, i in enumerate(unseen.tolist())]
        fresh = encode_images(clip_model, pool_images(torch.stack(fresh), size).to(device))
        table["photographs"]["unseen"] = caption_match(fresh, prompts, unseen)["R-precision"]

    for name, bridge in {"samples": prior, "samples, no prior": None}.items():
        def draw(texts):
            conditions = text_conditions(texts, bridge, args.temperature)
            return encode_images(clip_model, model.generate(conditions, latent_prior, args.temperature))

        torch.manual_seed(args.seed)
        own = torch.arange(len(texts), device=device).repeat_interleave(8)              # eight of each caption
        drawn = draw(texts[own])
        table[name] = caption_match(drawn, texts, own)
        table[name]["diversity"] = sum(map(diversity, drawn.split(8))) / len(texts)
        table[name]["CMMD"] = cmmd(draw(data["caption_embeddings"][held][:, 0].to(device)), held_real)
        if data["split"] == "toy":
            table[name]["unseen"] = caption_match(draw(prompts[unseen]), prompts, unseen)["R-precision"]
        if prior is None:
            break  # conditioned on captions: there is no bridge to leave out

    print(f"{path}, {len(images)} held-out photographs: {storage['bpd']:.3f} bits/dim, KL {storage['kl']:.0f} nats, "
          f"PSNR {storage['psnr']:.1f} dB")
    print(" " * 20 + "".join(f"{column:>13}" for column in table["samples"]))
    for name, row in table.items():
        print(f"{name:20}" + "".join(f"{value:13.3f}" for value in row.values()))
    with atomic(path.parent / "evaluation.json") as temporary:
        temporary.write_text(json.dumps({"checkpoint": str(path), **storage, "table": table}, indent=2))
    x, condition = take(images, torch.arange(min(8, len(images)), device=device), device), conditions[:8]
    save_grid(path.parent / "reconstructions.png", [x, model(x, condition)[0]], ["held-out photographs", "reconstructions"])
    save_levels(path.parent / "levels.png", model, x, condition, latent_prior)
    print(f"Also in {path.parent}: evaluation.json, reconstructions.png, levels.png")


# %% 8. A toy world ---------------------------------------------------------------------------------
# Everything above, for those without COCO, CLIP's weights or a GPU: pastures drawn with a few ellipses,
# written as a COCO folder, and a miniature CLIP trained on them, written as a CLIP weights file. From
# there on `demo` calls the same prepare, train, sample and evaluate as everyone else. Because we know
# what we drew, the toy world is also where the method can be measured best.

SUBJECTS = {"sheep": ("a sheep", "two sheep", "three sheep"), "cow": ("a cow", "two cows", "three cows"),
            "horse": ("a horse", "two horses", "three horses")}
GROUNDS = {"grass": ("on green grass", "in a meadow"), "snow": ("in the snow", "on a snowy field"),
           "field": ("on a bare field", "on brown earth")}
SKIES = {"blue": ("under a blue sky", "on a sunny day"), "grey": ("under a grey sky", "on a cloudy day"),
         "sunset": ("at sunset", "under a red evening sky"), "night": ("at night", "under the stars")}
RELIEFS = {"hills": ("with hills behind", "below a hill"), "mountains": ("in front of mountains", "in the mountains")}
# never drawn, neither for CLIP nor for the CVAE: what the model makes of these, it composed by itself
UNSEEN = [("cow", "snow", "sunset"), ("sheep", "field", "night"), ("horse", "grass", "grey"), ("sheep", "snow", "blue")]
SKY_COLOURS = {"blue": ((60, 130, 225), (175, 215, 245)), "grey": ((135, 140, 146), (190, 193, 196)),
               "sunset": ((120, 70, 130), (255, 160, 70)), "night": ((8, 12, 40), (38, 48, 100))}  # top, horizon
GROUND_COLOURS = {"grass": (84, 158, 52), "snow": (236, 241, 249), "field": (156, 108, 62)}
LIGHT = {"blue": (1, 1, 1), "grey": (0.9, 0.9, 0.92), "sunset": (1, 0.86, 0.78), "night": (0.56, 0.6, 0.72)}
TOY_IMAGES = 3000


def draw_animal(draw, kind, x, y, width, facing, light):
    """Draw a sheep, a cow or a horse that stands at (x, y), `width` pixels long, facing -1 or 1."""

    def shade(red, green, blue):
        return tuple(int(value * factor) for value, factor in zip((red, green, blue), light))

    def ellipse(cx, cy, rx, ry, colour):  # in units of the width, from where the animal stands
        cx, cy = x + facing * cx * width, y + cy * width
        draw.ellipse((cx - rx * width, cy - ry * width, cx + rx * width, cy + ry * width), fill=colour)

    def polygon(points, colour):
        draw.polygon([(x + facing * px * width, y + py * width) for px, py in points], fill=colour)

    coat, dark, pale = {
        "sheep": (shade(246, 240, 222), shade(30, 28, 28), shade(225, 216, 196)),
        "cow": (shade(158, 72, 36), shade(110, 48, 24), shade(250, 246, 238)),
        "horse": (shade(44, 34, 32), shade(20, 16, 16), shade(90, 74, 66)),
    }[kind]
    leg_top = {"sheep": -0.3, "cow": -0.34, "horse": -0.46}[kind]
    for leg in (-0.3, -0.17, 0.17, 0.3):
        polygon([(leg - 0.04, leg_top), (leg + 0.04, leg_top), (leg + 0.035, 0), (leg - 0.035, 0)], dark)
    if kind == "sheep":
        for cx, cy in ((-0.28, -0.38), (-0.12, -0.46), (0.08, -0.47), (0.24, -0.4), (-0.2, -0.3), (0.0, -0.3), (0.18, -0.3)):
            ellipse(cx, cy, 0.19, 0.16, coat)
        ellipse(0.0, -0.36, 0.34, 0.18, coat)
        ellipse(-0.08, -0.3, 0.2, 0.07, pale)
        ellipse(0.43, -0.47, 0.1, 0.13, dark)
        ellipse(0.36, -0.56, 0.08, 0.04, dark)
        ellipse(0.36, -0.6, 0.08, 0.06, coat)
    elif kind == "cow":
        ellipse(0.0, -0.44, 0.4, 0.19, coat)
        polygon([(-0.36, -0.56), (0.34, -0.58), (0.36, -0.34), (-0.36, -0.32)], coat)
        ellipse(-0.18, -0.5, 0.12, 0.1, pale)
        ellipse(0.12, -0.4, 0.1, 0.08, pale)
        polygon([(-0.39, -0.52), (-0.43, -0.5), (-0.44, -0.18), (-0.41, -0.18)], dark)
        polygon([(0.26, -0.6), (0.42, -0.68), (0.46, -0.5), (0.3, -0.4)], coat)
        ellipse(0.46, -0.56, 0.1, 0.12, coat)
        ellipse(0.5, -0.48, 0.07, 0.06, pale)
        polygon([(0.38, -0.66), (0.36, -0.78), (0.43, -0.67)], pale)
        polygon([(0.47, -0.66), (0.52, -0.77), (0.52, -0.64)], pale)
    else:
        ellipse(0.0, -0.56, 0.36, 0.16, coat)
        polygon([(0.18, -0.6), (0.36, -0.98), (0.48, -0.9), (0.34, -0.48)], coat)
        polygon([(0.12, -0.66), (0.32, -1.0), (0.38, -0.98), (0.24, -0.6)], dark)
        polygon([(0.34, -0.98), (0.44, -1.0), (0.62, -0.8), (0.56, -0.72), (0.4, -0.84)], coat)
        polygon([(0.36, -0.98), (0.38, -1.08), (0.42, -0.98)], dark)
        polygon([(-0.32, -0.64), (-0.46, -0.56), (-0.48, -0.22), (-0.38, -0.3)], dark)


def draw_pasture(scene, seed):
    """Draw a scene (animal, ground, sky, relief, count, side): a PIL image of 128 pixels.

    The scene fixes what a caption can say; the seed settles the rest: the skyline, clouds, stars, sizes,
    places. Drawn at twice the size, then halved, so that edges are smooth.
    """
    animal, ground, sky, relief, count, side = scene
    dice, full = random.Random(seed), 2 * SIZE
    light = LIGHT[sky]
    top, bottom = np.array(SKY_COLOURS[sky], dtype=float)
    horizon = dice.uniform(0.45, 0.48) * full
    variant = dice.choice((0.0, 0.33, 0.67))  # of three skylines
    blend = np.clip(np.arange(full) / horizon, 0, 1)[:, None, None]
    rows = (top * (1 - blend) + bottom * blend).repeat(full, axis=1)               # (256, 256, 3)
    picture = Image.fromarray(rows.astype(np.uint8))
    draw = ImageDraw.Draw(picture)

    def shade(colour, factor=1.0):
        return tuple(min(255, int(value * tint * factor)) for value, tint in zip(colour, light))

    if sky == "night":
        for number in range(16):  # the same stars every night
            x, y, r = full * (number * 0.618 % 1), full * (0.03 + number * 0.377 % 0.33), 1.5
            draw.ellipse((x - r, y - r, x + r, y + r), fill=(235, 235, 215))
    if sky in ("night", "sunset"):  # a moon, or a low sun
        x, r = dice.choice((0.2, 0.5, 0.8)) * full, 0.07 * full
        y = 0.16 * full if sky == "night" else horizon - 0.16 * full
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(245, 240, 210) if sky == "night" else (255, 225, 120))
    else:
        cloud = (250, 251, 253) if sky == "blue" else (172, 175, 180)
        shift = dice.choice((0.0, 0.3, 0.6))
        for place, height, size in ((0.15, 0.13, 0.08), (0.6, 0.2, 0.07)):
            x, y, r = (place + shift) % 1 * full, height * full, size * full
            for dx, dy in ((-1.2, 0.3), (0, 0), (1.1, 0.35)):
                draw.ellipse((x + (dx - 1) * r, y + (dy - 0.6) * r, x + (dx + 1) * r, y + (dy + 0.6) * r), fill=cloud)
    earth = GROUND_COLOURS[ground]
    if relief == "mountains":
        for place, height in ((0.1, 0.2), (0.75, 0.18), (0.4, 0.26)):
            x, height = (place + variant) % 1 * full, height * full
            peak, half = horizon - height, 1.2 * height
            draw.polygon([(x - half, horizon + 4), (x, peak), (x + half, horizon + 4)], fill=shade((106, 112, 132)))
            draw.polygon([(x - 0.3 * half, peak + 0.3 * height), (x, peak), (x + 0.3 * half, peak + 0.3 * height),
                          (x, peak + 0.22 * height)], fill=shade((240, 243, 248)))
    else:
        for layer, factor in ((0.09, 0.72), (0.04, 0.84)):
            phase = 6.3 * (variant + 5 * layer)
            line = [(x, horizon - layer * full * (1 + 0.8 * math.sin(phase + 9 * x / full)))
                    for x in range(0, full + 8, 8)]
            draw.polygon([*line, (full, full), (0, full)], fill=shade(earth, factor))
    draw.rectangle((0, horizon, full, full), fill=shade(earth))
    width = (0.56, 0.44, 0.34)[count - 1] * full
    places = {1: [0.32 if side == "left" else 0.68], 2: [0.26, 0.74], 3: [0.18, 0.5, 0.82]}[count]
    for place in places:
        x, y = (place + dice.uniform(-0.015, 0.015)) * full, dice.uniform(0.87, 0.9) * full
        draw_animal(draw, animal, x, y, width, 1 if side == "left" else -1, light)
    return picture.resize((SIZE, SIZE), Image.BOX)


def caption_scene(animal, ground, sky, count=1):
    """The shortest full description of a scene."""
    return f"{SUBJECTS[animal][count - 1]} {GROUNDS[ground][0]} {SKIES[sky][0]}"


def caption_pasture(scene, dice):
    """Five captions of a scene, the first one the shortest full description."""
    animal, ground, sky, relief, count, side = scene
    subject = SUBJECTS[animal][count - 1]
    grounds, skies, reliefs = (dice.sample(words[key], 2) for words, key in
                               ((GROUNDS, ground), (SKIES, sky), (RELIEFS, relief)))
    where = f"on the {side}" if count == 1 else "side by side"
    return [caption_scene(animal, ground, sky, count),
            f"{subject} {grounds[0]} {skies[0]}, {reliefs[0]}",
            f"{subject} {skies[1]}, {where}, {grounds[1]}",
            f"{subject} {grounds[0]} {reliefs[1]}",
            f"{skies[0]}, {subject} {grounds[1]}"]


def random_scene(dice):
    """A scene whose combination of animal, ground and sky is not one of the unseen."""
    while True:
        scene = [dice.choice(list(options)) for options in (SUBJECTS, GROUNDS, SKIES, RELIEFS)]
        if tuple(scene[:3]) not in UNSEEN:
            return *scene, dice.randint(1, 3), dice.choice(("left", "right"))


def draw_toy_world(root):
    """Write the toy world as a COCO folder: root/toy/*.jpg and root/annotations/captions_toy.json."""
    dice = random.Random(0)
    (root / "toy").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number in tqdm(range(TOY_IMAGES), desc="drawing pastures", unit="img"):
        scene = random_scene(dice)
        name = f"{number:012}.jpg"
        with atomic(root / "toy" / name) as temporary:
            draw_pasture(scene, seed=number).save(temporary, quality=95)
        images.append({"id": number, "file_name": name, "width": SIZE, "height": SIZE})
        annotations += [{"image_id": number, "caption": text} for text in caption_pasture(scene, dice)]
    with atomic(root / "annotations/captions_toy.json") as temporary:  # last: it says that all is drawn
        temporary.write_text(json.dumps({"images": images, "annotations": annotations}))


def train_toy_clip(root, path, steps=600, batch=128):
    """Train a miniature CLIP on the toy world, with CLIP's own loss; save it for clip.load."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import clip
        from clip.model import CLIP
    photographs = read_captions(root / "annotations/captions_toy.json", SUBJECTS)
    pixels = torch.stack([centre_square(decode(root / "toy" / p["file_name"], 48), 48)
                          for p in tqdm(photographs, desc="reading pastures", unit="img")])
    pixels = (pixels / 255 - CLIP_MEAN) / CLIP_STD                                     # (N, 3, 48, 48)
    texts = [caption for p in photographs for caption in p["captions"]]
    tokens = clip.tokenize(texts, 24).view(len(photographs), CAPTIONS, 24)             # (N, 5, 24)
    torch.manual_seed(0)
    model = CLIP(embed_dim=32, image_resolution=48, vision_layers=2, vision_width=64, vision_patch_size=8,
                 context_length=24, vocab_size=49408, transformer_width=64, transformer_heads=1,
                 transformer_layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    with tqdm(range(steps), desc="training a miniature CLIP") as bar:
        for step in bar:
            index = torch.randint(len(pixels), (batch,))
            captions = tokens[index, torch.randint(CAPTIONS, (batch,))]
            # every picture against every caption of the batch: the pairs are on the diagonal
            logits, _ = model(pixels[index], captions)                                 # (n, n)
            target = torch.arange(batch)
            loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    with atomic(path) as temporary:
        torch.save(model.state_dict(), temporary)


DEMO_PROMPTS = ["a sheep on green grass under a blue sky", "two cows in the snow under a grey sky",
                "a horse on a bare field at sunset", "three sheep on green grass at night",
                "a cow on a bare field under a blue sky", "a horse in the snow at night",
                "two horses on green grass at sunset", "two sheep on a bare field under a grey sky",
                "a sheep on a bare field at night", "a cow in the snow at sunset"]  # the last two are unseen


def demo(args):
    """The whole tutorial on drawn pastures: each step is a command that you could type yourself."""
    root = Path("data/toy")
    if not (root / "annotations/captions_toy.json").exists():
        draw_toy_world(root)
    if not (root / "clip.pt").exists():
        train_toy_clip(root, root / "clip.pt")
    for line in (f"prepare --coco {root} --split toy --words sheep cow horse --clip {root}/clip.pt --data data/toy.pt",
                 f"train --data data/toy.pt --epochs {args.epochs} --batch 16 --dropout 0.1",
                 f"sample -n 4 {shlex.join(DEMO_PROMPTS)}",
                 "evaluate"):
        print(f"\n$ python cvae.py {line}")
        step = parse_arguments(shlex.split(line))
        step.function(step)


# %% 9. The command line ----------------------------------------------------------------------------


def between(kind, low, high):
    """An argparse type: a number of the given kind from low to high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # also refuses nan
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = "number"  # argparse says "invalid number value: 'x'"
    return parse


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description="Text to picture with a CLIP-conditioned VAE.",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an expected error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(function, help):
        made = commands.add_parser(function.__name__, help=help, description=help,
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        made.set_defaults(function=function)
        return made

    p = command(prepare, "fetch COCO's matching photographs, crop and embed them: one data file")
    p.add_argument("--theme", choices=THEMES, default="bucolic", help="word list that captions must match")
    p.add_argument("--words", nargs="+", metavar="WORD", help="a word list of your own")
    p.add_argument("--split", default="train2017", choices=["train2017", "val2017", "toy"], help="part of COCO")
    p.add_argument("--coco", metavar="DIR", help="a COCO folder on disk; nothing is fetched")
    p.add_argument("--mirror", metavar="URL", default=COCO_URL, help="base address to fetch from")
    p.add_argument("--clip", default="ViT-B/32", help="CLIP's name, or a file of its weights")
    p.add_argument("--data", default=DATA, help="data file to write")

    p = command(train, "train a model on the data file")
    p.add_argument("--size", type=int, choices=[64, 128], default=64, help="pixels")
    p.add_argument("--dropout", nargs="?", type=between(float, 0, 0.9), const=0.3, default=0.0, metavar="P",
                   help="dropout on the global latent; 0.3 if no P is given")
    p.add_argument("--condition", choices=["image", "text"], default="image",
                   help="embedding to condition on: the photograph's, or one of its captions'")
    p.add_argument("--latents", choices=["ladder", "flat"], default="ladder",
                   help="latents at every resolution, or only the global one")
    p.add_argument("--objective", choices=OBJECTIVES, default="elbo", help="the ELBO or the report's loss")
    p.add_argument("--epochs", type=between(int, 1, 100_000), default=25)
    p.add_argument("--batch", type=between(int, 1, 4096), default=32)
    p.add_argument("--lr", type=between(float, 1e-7, 1), default=3e-3, help="peak learning rate")
    p.add_argument("--seed", type=between(int, 0, 2**31 - 1), default=0)
    p.add_argument("--data", default=DATA, help="data file to read")
    p.add_argument("--run", metavar="DIR", help="run folder (default: a new one in runs/)")
    p.add_argument("--resume", action="store_true", help="go on with --run (default: the newest)")

    p = command(sample, "draw pictures for prompts")
    p.add_argument("prompts", nargs="*", metavar="PROMPT")
    p.add_argument("-n", type=between(int, 1, 64), default=8, help="pictures per prompt")
    p.add_argument("--seed", type=between(int, 0, 2**31 - 1), default=0)
    p.add_argument("--temperature", type=between(float, 0, 2), default=TEMPERATURE,
                   help="below 1 the samples are more typical, and more alike")
    p.add_argument("--guidance", type=between(float, 0, 10), default=1.0,
                   help="above 1, exaggerate what sets the prompt apart")
    p.add_argument("--rerank", type=between(int, 0, 4096), default=0, metavar="N",
                   help="draw N per prompt and keep those that CLIP likes best")
    p.add_argument("--image", metavar="FILE", help="draw variations of a photograph")
    p.add_argument("--interpolate", action="store_true", help="go from the first prompt to the second")
    p.add_argument("--no-prior", action="store_true", help="feed text embeddings as they are")
    p.add_argument("--checkpoint", metavar="FILE", help="checkpoint or run folder (default: the newest run)")
    p.add_argument("--clip", help="the run's CLIP, if its file has moved")
    p.add_argument("--out", default="samples", metavar="DIR", help="folder for the picture")

    p = command(evaluate, "measure a run on what was held out")
    p.add_argument("--seed", type=between(int, 0, 2**31 - 1), default=0)
    p.add_argument("--temperature", type=between(float, 0, 2), default=TEMPERATURE, help="as for sample")
    p.add_argument("--checkpoint", metavar="FILE", help="checkpoint or run folder (default: the newest run)")
    p.add_argument("--clip", help="the run's CLIP, if its file has moved")

    p = command(demo, "a toy world from drawing to sampling: no download, no GPU, five minutes")
    p.add_argument("--epochs", type=between(int, 1, 1000), default=10, help="fewer is quicker and worse")
    return parser.parse_args(argv)


def main(argv=None):
    """Run one command; an expected failure becomes one sentence and exit status 1."""
    args = parse_arguments(argv)
    try:
        args.function(args)
    except (Stop, KeyboardInterrupt, OSError, torch.OutOfMemoryError) as error:
        if args.debug:
            raise
        message = str(error)
        if isinstance(error, torch.OutOfMemoryError):
            message = "The GPU ran out of memory; " + (
                f"try --batch {max(1, args.batch // 2)}." if "batch" in args else "try a smaller -n.")
        elif isinstance(error, KeyboardInterrupt):
            message = message or "Interrupted. What was finished is kept; the same command goes on from there."
        sys.exit(f"\n{message}")


if __name__ == "__main__" and "ipykernel" not in sys.modules:
    main()  # in a notebook, call it yourself: main(["sample", "sheep on a hill"])
