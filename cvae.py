"""Text to picture in one file: a variational autoencoder (VAE), conditioned on CLIP, with a learned prior.

Training, part one: the VAE learns a small code z for every photograph x.

    x ─► encoder ─► mu, sigma ─► z = mu + sigma·e ─► decoder ─► reconstruction of x
            ▲                                          ▲
            └──────── condition c: what CLIP ──────────┘
                      says about x or its caption

Training, part two: the prior learns which codes go with which condition.

    noise ─► transformer, 16 small steps, told c ─► z

Sampling puts the two together.

    prompt ─► CLIP's text encoder ─► c      noise ─► prior, told c ─► z      z, c ─► decoder ─► picture

The quickest tour needs neither a download nor a GPU (a few minutes on two processor cores):

    python cvae.py demo

The real thing, on the photographs of MS-COCO that show cows and sheep:

    python cvae.py prepare                            # fetch, crop, embed: one data file
    python cvae.py train --size 128 --dropout         # a run folder with checkpoints and pictures
    python cvae.py sample "sheep on a hill"           # a captioned row of pictures
    python cvae.py evaluate                           # how good it is, in numbers and pictures

Contents (each `# %%` is a notebook cell in VS Code, Spyder and Jupyter)

    1. The data        which COCO photographs are bucolic
    2. CLIP            two encoders, one space
    3. The VAE         encoder, reparameterisation, decoder; where the condition enters and why twice
    4. The ELBO        derived line by line; the calibrated likelihood; the report's loss
    5. Training        one loop for both parts
    6. The prior       why N(0, I) draws fog; flow matching; guidance
    7. Sampling        from text, from an image, in between
    8. Evaluation      on pictures that nothing was chosen on
    Appendices         A. a toy world   B. devices, files, downloads   C. the commands

Sections 1 to 8 are the lesson. What they call from the appendices does what its name says. `Stop` is our
exception for an expected failure: its sentence is all that the user sees.

The project it reimplements: Azarbal, Benjelloun Touimi, Tazi, "Generative CLIP-Conditioned Variational
Autoencoders" (Brown University, 2024), called "the report" below.
"""
import os
import signal
import sys


def say_goodbye(*_):
    """Ctrl-C while PyTorch is being imported, which takes seconds: one line, no traceback."""
    os.write(2, b"\nInterrupted.\n")
    os._exit(1)


if __name__ == "__main__" and "ipykernel" not in sys.modules:  # a notebook interrupts in its own way
    signal.signal(signal.SIGINT, say_goodbye)

import argparse
import contextlib
import errno
import hashlib
import http.client
import io
import json
import math
import random
import re
import shlex
import socket
import tempfile
import time
import unicodedata
import urllib.parse
import urllib.request
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from tqdm import tqdm

# clip, torchvision, pycocotools and matplotlib take a second or more to import, so each is imported where
# it is used: `--help` should not wait for a plotting library. And there are warnings about which a reader can
# do nothing: clip uses what is deprecated elsewhere, and matplotlib has no glyph for a prompt's emoji.
for about in "pkg_resources is deprecated", "`torch.jit.load` is deprecated", "Glyph":
    warnings.filterwarnings("ignore", about)

# %% 1. The data ------------------------------------------------------------------------------------
# MS-COCO (Lin et al. 2014, arXiv 1405.0312) has 118,287 training photographs with five captions each. We
# want the rural ones, and we let the captions choose: a photograph is bucolic when somebody who described
# it used one of a few words (COCO's own labels know no hills). So small a model can learn a narrow subject.

THEMES = {
    "bucolic": ["cow", "sheep"],
    "nature": ["cow", "sheep", "mountain", "hill", "countryside", "grass", "forest", "nature", "farm",
               "alpaca", "horse", "landscape", "fence"],
    "all": [""],  # the empty word is in every caption
}
SIZE = 128           # pixels in the data file; a model of 64 pixels averages them down
CAPTIONS = 5         # captions kept per photograph, COCO's usual number
TRAINING, VALIDATION, TEST = 0, 1, 2  # the three parts of the data


def word_pattern(words):
    """A regular expression that finds any of `words`, as words, in a caption.

    The report searched for substrings, so "cow" also found cowboys and scowling men. Here a match
    starts where a word starts and ends where a word ends, but for an ending that keeps the meaning:
    cows, grassy, hillside, farmland, mountainous, horseback.
    """
    stems = "|".join(re.escape(word) for word in words)
    endings = "s|es|y|ed|ous|lands?|sides?|tops?|yards?|house|back"
    return re.compile(rf"(?<!\w)(?:{stems})(?:{endings})?(?!\w)" if any(words) else "", re.IGNORECASE)


def read_captions(path, words):
    """The photographs of a COCO captions file whose captions mention one of `words`.

    Returns a list of dicts with id, file_name, size (width, height) and captions. Raises Stop when the
    file is missing, is no captions file, or nothing matches.
    """
    images, annotations = read_records(path)
    # pycocotools joins the two lists, half a second for train2017; it wants captions numbered, and it prints
    from pycocotools.coco import COCO
    coco = COCO()
    coco.dataset = {"images": images, "annotations": [a | {"id": i} for i, a in enumerate(annotations)]}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    photographs = {}  # by file name: a photograph that is listed twice is one photograph
    for image in coco.imgs.values():
        photograph = photographs.setdefault(image["file_name"], image | {"captions": []})
        photograph["captions"] += [a["caption"] for a in coco.imgToAnns[image["id"]]]
    pattern = word_pattern(words)
    chosen = [p for p in photographs.values() if any(pattern.search(caption) for caption in p["captions"])]
    if not chosen:
        raise Stop(f"No caption in {path} mentions any of: {', '.join(words)}.")
    return chosen


def centre_square(photograph, size):
    """The largest centred square of a PIL image, resized: uint8 tensor (3, size, size).

    CLIP and the VAE both see this crop, so the condition describes the pixels to reconstruct. The
    report squashed the whole photograph into a square for one of the two, which changes its shapes.
    """
    from torchvision.transforms.v2 import InterpolationMode, functional
    pixels = functional.pil_to_tensor(photograph)                                       # (3, H, W)
    square = functional.center_crop(pixels, [min(photograph.size)] * 2)
    return functional.resize(square, [size, size], InterpolationMode.BICUBIC, antialias=True)


def split_parts(images):
    """Sort photographs into three parts by a hash of their pixels: uint8 (N, 3, H, H) -> (N,).

    A photograph goes into one part with all its captions. Training pictures teach. Validation pictures
    choose: checkpoints and every setting chosen by looking. Test pictures are for `evaluate` alone. Equal
    pictures have equal hashes: one that is in the data twice is never learned from and judged by at once.
    """
    hashes = [int(hashlib.sha256(image.numpy().tobytes()).hexdigest()[:15], 16) for image in images]
    different, rank = torch.tensor(hashes).unique(return_inverse=True)  # rank among the sorted hashes
    if len(different) < 3:
        raise Stop("Too few different photographs: at least three are needed, one for each part of the data.")
    test = max(1, min(1000, len(different) // 10))
    validation = max(1, min(500, len(different) // 20))
    part = torch.full_like(rank, TRAINING)
    part[rank < test + validation] = VALIDATION
    part[rank < test] = TEST
    return part


# %% 2. CLIP ----------------------------------------------------------------------------------------
# CLIP (Radford et al. 2021, arXiv 2103.00020) trained an image encoder and a text encoder together, so that a
# picture and its caption point the same way: cos(image, caption) is high for a pair and low for a mismatch.
# Only directions count, so every embedding is scaled to length one. It has D numbers: 512 for ViT-B/32.

CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
CPU = torch.device("cpu")  # there CLIP computes in bfloat16 if that is fast; on CUDA its weights are float16


@torch.no_grad()
def encode_images(model, images):
    """Embed pictures with CLIP: uint8 or [0, 1] float (N, 3, H, H) -> unit vectors (N, D)."""
    resolution, embeddings, batches = model.visual.input_resolution, [], images.split(64)
    if len(batches) > 8:  # takes a while
        batches = tqdm(batches, desc="CLIP, images", leave=False)
    for some in batches:
        pixels = some.float() / 255 if some.dtype == torch.uint8 else some
        if pixels.shape[-1] != resolution:
            pixels = F.interpolate(pixels, (resolution,) * 2, mode="bicubic", antialias=True).clamp(0, 1)
        # CLIP was trained on pixels normalised by these constants; the report fed it raw [0, 1] values
        pixels = (pixels - CLIP_MEAN.to(pixels.device)) / CLIP_STD.to(pixels.device)
        with autocast(CPU, choose_precision(CPU)):
            embeddings.append(F.normalize(model.encode_image(pixels).float(), dim=-1))
    return torch.cat(embeddings)


@torch.no_grad()
def encode_texts(model, texts):
    """Embed N captions with CLIP, which reads 77 tokens, some 55 words, of each: unit vectors (N, D)."""
    import clip
    device, embeddings = model.text_projection.device, []
    for start in tqdm(range(0, len(texts), 64), "CLIP, captions", leave=False, disable=len(texts) <= 512):
        tokens = clip.tokenize(texts[start:start + 64], model.context_length, truncate=True)    # (n, 77)
        # the end token has the largest number; CLIP reads from left to right, so the zeros that follow
        # the longest caption's end change nothing, and captions are short: most of the work is saved
        tokens = tokens[:, :int(tokens.argmax(1).max()) + 1]
        with autocast(CPU, choose_precision(CPU)):
            embeddings.append(F.normalize(model.encode_text(tokens.to(device)).float(), dim=-1))
    return torch.cat(embeddings)


# An embedding never changes, so `prepare` (appendix C) computes them once and writes one data file with
# pixels, embeddings and parts. The report ran CLIP anew for every image of every epoch.
#
# The gap. CLIP pulls pairs together, but only relative to mismatches: images and captions end up in two
# separate narrow cones ("Mind the gap", Liang et al. 2022, arXiv 2203.02053). The report trained on image
# embeddings and prompted with text embeddings, which its decoder had never seen. Here each training
# picture comes with its own embedding or, at random, with one of its captions', and every network is told
# which kind it gets. Then prompts and pictures are both familiar.

PICTURE, CAPTION, NOTHING = 0, 1, 2  # kinds of condition; NOTHING teaches the prior to draw without one


class Condition(nn.Module):
    """An embedding as the networks want it: (N, D) and its kind (one number, or (N,)) -> (N, width).

    Embeddings crowd into a narrow cone. Standardised, each kind by its own mean and deviation, their
    differences are what a network sees. A learned vector adds what kind it is.
    """

    def __init__(self, dimensions, width):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2, dimensions))
        self.register_buffer("std", torch.ones(2, dimensions))
        self.project = nn.Linear(dimensions, width)
        self.kind = nn.Embedding(3, width)
        nn.init.zeros_(self.kind.weight)  # at first all kinds look alike

    def learn_statistics(self, data, rows):
        """Mean and deviation of both kinds of embeddings, over these rows of the data."""
        for kind, some in ((PICTURE, data["image_embeddings"][rows]),
                           (CAPTION, data["caption_embeddings"][rows].flatten(0, 1))):
            self.mean[kind], self.std[kind] = some.mean(0), some.std(0) + 1e-6

    def standardise(self, embedding, kind):
        return (embedding - self.mean[kind]) / self.std[kind]                           # (N, D)

    def forward(self, embedding, kind):
        kind = torch.as_tensor(kind, device=embedding.device).expand(len(embedding))
        known = self.project(self.standardise(embedding, kind.clamp(max=CAPTION)))      # (N, width)
        # NOTHING has no mean and deviation; it borrowed a caption's, and what came of it is not used
        return torch.where(kind[:, None] == NOTHING, 0.0, known) + self.kind(kind)


def draw_condition(data, rows, device):
    """For photographs (n,) of the data: embeddings (n, D) and kinds (n,).

    Seven of ten are a caption's, because prompts are what the model will be asked most.
    """
    kind = torch.where(torch.rand(len(rows), device=device) < 0.7, CAPTION, PICTURE)
    which = torch.randint(CAPTIONS, (len(rows),), device=device)  # another caption at every visit
    captions, pictures = data["caption_embeddings"][rows, which], data["image_embeddings"][rows]
    return torch.where(kind[:, None] == CAPTION, captions, pictures), kind


# %% 3. The VAE -------------------------------------------------------------------------------------
# A VAE (Kingma & Welling 2013, arXiv 1312.6114) has two halves. The encoder q(z | x, c) looks at a picture x
# and says which codes z could have made it. The decoder p(x | z, c) makes a picture from a code. The
# condition c enters both, for different reasons. The encoder gets it so that z need not store what c
# already says. The decoder gets it because at sampling time c is what it knows about the prompt.
#
# What shape should z have? The report's is one vector of 128 numbers ("flat"). Ours is a small grid: one
# code for each square of 8x8 pixels. A cell then says what is in its square, and the decoder need not
# work out where things are. Latent diffusion (Rombach et al. 2022, arXiv 2112.10752) uses such a grid.
#
# Arithmetic at full resolution is what costs: a convolution at 64x64 does 64 times the work of the same
# one at 8x8. So the first layer shrinks the picture four times, and the last one enlarges it.
#
# Deep networks learn the simple things slowly: after a minute and a half the colours were still missing. So a
# linear short cut runs beside encoder and decoder. By itself it is what a JPEG does, a few weighted sums
# of each 8x8 square; the deep layers add what sums can't say. (DC-AE, Chen et al. 2024, arXiv 2410.10733,
# shortens the way similarly.) In equal time it brought 2 dB, and samples whose kind can be told.

CHANNELS = 12        # numbers in each cell of the grid: photographs need more than drawings
FLAT = 128           # numbers in the flat code, the report's
WIDTHS = 32, 64, 96  # channels at a half, a quarter and an eighth of the picture's side
SHRUNK = 32          # the condition's share of the channels, the report's


class ResBlock(nn.Module):
    """Two 3x3 convolutions that correct their input (He et al. 2015, arXiv 1512.03385): shape in = shape out.

    Group norm, because batch norm's statistics differ between training and sampling. The last
    convolution starts at zero, so that a new block changes nothing.
    """

    def __init__(self, width):
        super().__init__()
        self.change = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
                                    nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        nn.init.zeros_(self.change[-1].weight)

    def forward(self, h):
        return h + self.change(h)


def enlarge(above, width, kernel=1, times=2):
    """Each cell becomes a square of cells, 2x2 or larger (sub-pixel convolution, arXiv 1609.05158)."""
    conv = nn.Conv2d(above, times**2 * width, kernel, padding=kernel // 2)
    return nn.Sequential(conv, nn.PixelShuffle(times))


class VAE(nn.Module):
    """Encoder and decoder. size: pixels (64 or 128); condition_dim: D; latents: "grid" or "flat".

    The code z is (N, C, s, s): C = channels and s = size / 8 for a grid, C = 128 and s = 1 for a flat code,
    so that everything else treats both alike. dropout on z, the report's, makes the decoder rely more on c.
    """

    def __init__(self, size, condition_dim, latents="grid", dropout=0.0, channels=CHANNELS):
        super().__init__()
        side, (half, quarter, eighth) = size // 8, WIDTHS
        self.shape = (channels, side, side) if latents == "grid" else (FLAT, 1, 1)
        self.condition = Condition(condition_dim, SHRUNK)
        self.encoder = nn.Sequential(
            nn.Conv2d(3, quarter, 4, stride=4), ResBlock(quarter),                      # (N, 64, S/4, S/4)
            nn.Conv2d(quarter, eighth, 3, stride=2, padding=1),                         # (N, 96, S/8, S/8)
            ResBlock(eighth), ResBlock(eighth), nn.GroupNorm(8, eighth), nn.SiLU())
        if latents == "grid":
            self.to_latent = nn.Conv2d(eighth + SHRUNK, 2 * channels, 1)
            self.from_latent = nn.Conv2d(channels + SHRUNK, eighth, 3, padding=1)
            self.short_in = nn.Conv2d(3, 2 * channels, 8, stride=8)
            self.short_out = enlarge(channels, 3, kernel=3, times=8)  # squares that overlap: fainter seams
        else:  # a convolution as large as its input is a dense layer
            self.to_latent = nn.Conv2d(eighth + SHRUNK, 2 * FLAT, side)
            self.from_latent = nn.ConvTranspose2d(FLAT + SHRUNK, eighth, side)
            self.short_in = nn.Conv2d(3, 2 * FLAT, size, stride=size)
            self.short_out = nn.ConvTranspose2d(FLAT, 3, size)
        nn.init.zeros_(self.short_in.weight[self.shape[0]:])  # no short cut to logvar at first
        self.dropout = nn.Dropout(dropout)
        self.decoder = nn.Sequential(
            ResBlock(eighth), ResBlock(eighth),                                         # (N, 96, S/8, S/8)
            enlarge(eighth, quarter), ResBlock(quarter),                                # (N, 64, S/4, S/4)
            enlarge(quarter, half), nn.GroupNorm(8, half), nn.SiLU(),                   # (N, 32, S/2, S/2)
            enlarge(half, 3, kernel=3))                                                 # (N, 3, S, S)
        self.register_buffer("variance", torch.tensor(1.0))  # of the Gaussian, see section 4
        self.register_buffer("gain", torch.tensor(1.0))         # of fine detail, likewise

    def beside(self, h, embedding, kind):
        """Concatenate the condition to a map, the same in every cell: (N, C, s, s) -> (N, C + 32, s, s)."""
        condition = self.condition(embedding, kind)[:, :, None, None]                   # (N, 32, 1, 1)
        return torch.cat([h, condition.expand(-1, -1, *h.shape[2:])], dim=1)

    def encode(self, x, embedding, kind):
        """q(z | x, c): pictures (N, 3, S, S) in [0, 1] -> mu and logvar, (N, C, s, s) each."""
        x = x * 2 - 1  # layers learn best from inputs around zero
        h = self.encoder(x)                                                             # (N, 96, S/8, S/8)
        h = self.to_latent(self.beside(h, embedding, kind)) + self.short_in(x)          # (N, 2C, s, s)
        mu, logvar = h.float().chunk(2, dim=1)  # log sigma² may be any number, as a layer's output is
        return mu, logvar.clamp(-10, 4)         # but a wild exponent would end the training

    def decode(self, z, embedding, kind):
        """The mean of p(x | z, c): codes (N, C, s, s) -> pictures (N, 3, S, S) in [0, 1]."""
        z = self.dropout(z)
        h = self.from_latent(self.beside(z, embedding, kind))                           # (N, 96, S/8, S/8)
        return torch.sigmoid((self.decoder(h) + self.short_out(z)).float())

    def forward(self, x, embedding, kind):
        """Reconstruct x by a draw from q, reparameterised: picture (N, 3, S, S) and KL (N,) in nats."""
        mu, logvar = self.encode(x, embedding, kind)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)  # mu + sigma·e: gradients pass through
        return self.decode(z, embedding, kind), kl_divergence(mu, logvar)


# %% 4. The ELBO ------------------------------------------------------------------------------------
# We want parameters under which the photographs are likely: log p(x | c) = log ∫ p(x | z, c) p(z) dz. Nobody
# can compute that integral, so we bound it from below. For any distribution q(z), Jensen's inequality gives
#
#     log p(x | c)  >=  E_q [ log p(x | z, c) ]  -  KL( q(z | x, c) || p(z) )   =   ELBO
#
# The first term asks for good reconstructions. The second asks for codes that look like draws from
# p(z) = N(0, I). Training raises the bound; we lower its negative. What the bound loses is the KL from q to
# the true p(z | x, c), so raising it also makes the encoder a better guess of that.
#
# The likelihood p(x | z, c) is a Gaussian around the decoder's picture x̂, with one variance s² for all its D
# values (3 S S). A fixed s² would weigh the two terms against each other, as a hand-tuned "beta" does. The
# best one is known, the mean squared error: put it in (sigma-VAE, Rybkin et al. 2021, arXiv 2006.13202)
#
#     -log p(x | z, c) = D/2 log(2 pi s²) + |x - x̂|² / 2s²   =   D/2 log(2 pi e MSE)    at  s² = MSE
#
# Units. A natural logarithm counts nats; a bit is log 2 nats. Pixels are 256 levels, not real numbers. The
# remedy spreads each level over its width of 1/256 (dequantisation), which adds 1/(12·256²) to the expected
# MSE. Then minus the ELBO is a bound on the bits that a picture takes, and compares across models:
#
#     bits per dimension = (NLL + KL) / (D log 2) + log2(256)

QUANTISATION = 1 / (12 * 256**2)


def kl_divergence(mu, logvar):
    """KL( N(mu, sigma²) || N(0, I) ) in nats for codes (N, C, s, s): (N,)."""
    # ½ Σ [ sigma² + mu² - 1 - log sigma² ]
    return 0.5 * (logvar.exp() + mu**2 - 1 - logvar).flatten(1).sum(1)


def gaussian_nll(mse, dimensions, variance=None):
    """-log p(x | z, c) in nats; the variance is the best one for this mse if none is given."""
    variance = mse if variance is None else variance
    return 0.5 * dimensions * (torch.log(2 * math.pi * variance) + mse / variance)


def bits_per_dimension(nats, dimensions):
    """Nats per picture on [0, 1] pixels -> bits per 256-level value."""
    return nats / (dimensions * math.log(2)) + 8


def elbo_loss(picture, x, kl, kl_weight=1.0, variance=None):
    """Minus the ELBO in bits per dimension, averaged over the batch: a scalar."""
    dimensions = x[0].numel()
    nll = gaussian_nll(F.mse_loss(picture, x) + QUANTISATION, dimensions, variance)
    return bits_per_dimension(nll + kl_weight * kl.mean(), dimensions)


def original_loss(picture, x, kl, kl_weight=1.0, variance=None):
    """The report's loss: BCE summed over pixels, averaged over channels, + 0.5 KL + 0.1 (1 - SSIM).

    Cross-entropy on values that are not 0 or 1 is no likelihood. Near the target it curves like a
    Gaussian whose deviation is sqrt(x (1 - x)), up to half the brightness range. Under so much noise
    hardly any code is worth its KL, so the codes go unused and the pictures blur.
    """
    bce = F.binary_cross_entropy(picture, x, reduction="none").sum((1, 2, 3)) / 3
    return (bce + 0.5 * kl_weight * kl + 0.1 * (1 - ssim(picture, x)) / len(x)).mean()


OBJECTIVES = {"elbo": elbo_loss, "original": original_loss}

# A code stands for many pictures, and the decoder answers with their mean, which is smoother than any of
# them: fur and leaves average out. The likelihood calls it noise, but a picture with that noise is grainy. So
# for looking at, one number turns the detail up until it is as strong as in (validation) photographs.

def detail(pictures):
    """What a blur over 3x3 pixels takes away from pictures (N, 3, S, S): the same shape."""
    return pictures - F.avg_pool2d(pictures, 3, stride=1, padding=1, count_include_pad=False)


def sharpen(picture, gain):
    """Pictures (N, 3, S, S) for looking at: their fine detail, turned up."""
    return (picture + (gain - 1) * detail(picture)).clamp(0, 1)


def detail_gain(picture, x):
    """How many times stronger detail is in photographs x than in their reconstructions: a scalar."""
    return (detail(x).square().mean() / detail(picture).square().mean()).sqrt().clamp(1, 3)


# %% 5. Training ------------------------------------------------------------------------------------
# Both networks, the VAE and (section 6) the prior, are trained by the same loop. All pictures fit in memory
# as bytes (20,000 at 128 pixels are 1 GB), so there is no DataLoader: the whole uint8 tensor lives on the
# device, and a batch is an index into it. Nothing in the loop waits for the GPU except the progress bar.
#
# All randomness of step n comes from a generator seeded with (seed, n). So a run is determined by its
# configuration, and resuming needs no more than weights, optimiser state and n.
#
# `fit` is the loop. `vae_part`, and `prior_part` in section 6, bring what it needs of each network, above all
# a loss. `train` (appendix C) calls fit with the one and then, with the VAE's best weights, with the other.

WARM_UP = 50  # steps over which the learning rate rises


def learning_rate(step, total, peak):
    """Linear warm-up, a plateau, and a linear descent to zero over the second half of the steps."""
    return peak * min(1, (step + 1) / WARM_UP, (total - step) / (0.5 * total))


def follow(mean, network, step):
    """Move a running mean of the weights towards the weights: slowly, but quickly at first.

    The mean is what samples: it has less noise than any single step's weights (Polyak & Juditsky 1992).
    """
    with torch.no_grad():
        for averaged, weight in zip(mean.parameters(), network.parameters()):
            averaged.lerp_(weight, max(0.001, 9 / (step + 9)))  # 0.001: the mean of some thousand steps
        for kept, buffer in zip(mean.buffers(), network.buffers()):
            kept.copy_(buffer)


def vae_part(vae, images, data, config, device, dtype):
    """What fit needs to train the VAE."""
    objective, rows = OBJECTIVES[config["objective"]], rows_of(data, TRAINING)
    with autocast(device, dtype):
        some = rows[:config["batch"]]
        example = take(images, some, device), *draw_condition(data, some, device)
        forward = compiled(vae, example, device.type == "cuda" and config["compile"])  # a CPU gains nothing

    def loss(rows, step, total):
        x = take(images, rows, device)                                                  # (n, 3, S, S)
        if config["flip"]:  # a mirrored photograph is another photograph
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(3), x)
        with autocast(device, dtype):
            picture, kl = forward(x, *draw_condition(data, rows, device))
        mse = F.mse_loss(picture.detach(), x) + QUANTISATION
        vae.variance.lerp_(mse, max(0.01, 1 / (step + 1)))  # a running mean over the last hundred steps
        # the KL fades in over the first eighth: a code must say something before it is taxed
        return objective(picture, x, kl, min(1, 8 * step / total))

    x = take(images, rows[:512], device)
    grey = x.mean((0, 2, 3), keepdim=True).expand_as(x)  # the best that can be said without looking
    unseen = rows_of(data, VALIDATION)

    @torch.no_grad()
    def examine(mean):
        some = unseen[:256]
        x = take(images, some, device)
        picture, _ = mean(x, data["image_embeddings"][some], PICTURE)
        for network in vae, mean:
            network.gain.copy_(detail_gain(picture, x))
        return measure_vae(mean, images, data, unseen, device, objective)

    return SimpleNamespace(
        name="vae", network=vae, rows=rows, batch=config["batch"], epochs=config["epochs"], rate=config["lr"],
        option="--lr", loss=loss, ignorance=objective(grey, x, torch.zeros(len(x), device=device)).item(),
        examine=examine,
        draw=lambda path, mean: save_reconstructions(path, mean, images, data, unseen[:8], device))


@torch.no_grad()
def measure_vae(vae, images, data, rows, device, objective=elbo_loss):
    """Figures on photographs that were not trained on: dict with loss, bpd, kl (nats) and psnr (dB).

    The Gaussian's variance is the one of training, not one fitted to the pictures that are measured.
    """
    vae.eval()
    torch.manual_seed(0)  # the same noise at every call
    total = torch.zeros(4, device=device)
    for some in rows.split(64):
        x = take(images, some, device)
        picture, kl = vae(x, data["image_embeddings"][some], PICTURE)
        total += len(x) / len(rows) * torch.stack([
            objective(picture, x, kl, variance=vae.variance),
            elbo_loss(picture, x, kl, variance=vae.variance), kl.mean(), F.mse_loss(picture, x)])
    loss, bpd, kl, mse = total.tolist()
    return {"loss": loss, "bpd": bpd, "kl": kl, "psnr": -10 * math.log10(mse)}


def fit(part, run, config, models, history, device, dtype, saved=None):
    """Train one network: the loop that both parts share. Writes best.pt, last.pt, loss.png and epoch.png.

    `part` comes from vae_part or prior_part; `saved` is what last.pt says about it when a run is resumed.
    The running mean of the weights ends up in models[part.name]. Raises Stop when the loss becomes NaN or
    worse than ignorance, KeyboardInterrupt (after saving) on Ctrl-C.
    """
    network, batch = part.network, min(part.batch, len(part.rows))  # few photographs still train
    epoch_steps = len(part.rows) // batch  # what is left over has its turn after another shuffle
    total = part.epochs * epoch_steps
    models[part.name] = mean = deepcopy(network).requires_grad_(False).eval()
    # AdamW gives each weight a step of its own size (arXiv 1711.05101), by a memory of some hundred steps
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    learners = {"network": network, "mean": mean, "optimizer": optimizer, "scaler": scaler}
    state = {"part": part.name, "step": 0, "running": 0.0, "best": math.inf}
    if saved:
        state = {name: saved[name] for name in state}
        for name, learner in learners.items():
            learner.load_state_dict(saved[name])
    drawn = time.monotonic()

    def save_last():
        state["running"] = float(state["running"])
        weights = {name: learner.state_dict() for name, learner in learners.items()}
        save_checkpoint(run / "last.pt", config, models, history, state | weights)

    save_last()
    with noted_interrupts() as interrupted:
        while state["step"] < total:
            epoch, began, first = state["step"] // epoch_steps + 1, time.perf_counter(), state["step"]
            mean_loss = train_epoch(part, state, total, batch, config["seed"], mean, optimizer, scaler,
                                    interrupted)
            speed = (state["step"] - first) * batch / (time.perf_counter() - began)
            if state["step"] % epoch_steps == 0:  # the epoch is complete
                figures = part.examine(mean)
                learned = state["step"] - epoch_steps > 2 * WARM_UP  # it had time to
                must_be_sane(mean_loss, part, run, part.ignorance if learned else math.inf)
                must_be_sane(figures["loss"], part, run)
                history[part.name].append({"train_loss": mean_loss, **figures})
                state["running"] = 0.0
                if figures["loss"] < state["best"]:
                    state["best"] = figures["loss"]
                    save_checkpoint(run / "best.pt", config, models, history)
                measured = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
                print(f"{part.name}, epoch {epoch}/{part.epochs}: training loss {mean_loss:.3f}, validation "
                      f"{measured}; {speed:.0f} images/s")
                if time.monotonic() - drawn > 120 or epoch == part.epochs:  # pictures take a second or two
                    save_curves(run / "loss.png", history)
                    part.draw(run / "epoch.png", mean)
                    drawn = time.monotonic()
            save_last()
            if interrupted and epochs_left(config, history):
                raise KeyboardInterrupt(f"Stopped at step {state['step']} of {total}, nothing is lost. Go on "
                                        f"with: python cvae.py train --resume --run {run}")


def train_epoch(part, state, total, batch, seed, mean, optimizer, scaler, interrupted):
    """Train to the end of an epoch, or to Ctrl-C; return the epoch's mean loss so far."""
    epoch_steps = len(part.rows) // batch
    epoch, offset = divmod(state["step"], epoch_steps)
    shuffle = torch.Generator().manual_seed(seed * 1000 + epoch)
    order = part.rows[torch.randperm(len(part.rows), generator=shuffle)]
    part.network.train()
    with tqdm(total=epoch_steps * batch, initial=offset * batch, unit="img", leave=False,
              desc=f"{part.name}, epoch {epoch + 1}/{part.epochs}") as bar:
        while offset < epoch_steps and not interrupted:
            step = state["step"]
            torch.manual_seed(seed * 1_000_003 + step)
            loss = part.loss(order[offset * batch:][:batch], step, total)
            scaler.scale(loss).backward()  # scaler does nothing unless we compute in float16
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(part.network.parameters(), 1.0)  # one odd batch can't throw it off
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total, part.rate)
            scaler.step(optimizer)         # skipped where a float16 gradient overflowed: no harm, no NaN
            scaler.update()
            optimizer.zero_grad()
            follow(mean, part.network, step + 1)
            state["running"] = state["running"] + loss.detach()
            state["step"], offset = step + 1, offset + 1
            bar.update(batch)
            if offset % 20 == 0 or offset == epoch_steps or interrupted:
                mean_loss = float(state["running"]) / offset  # waits for the device
                must_be_sane(mean_loss, part)
                bar.set_postfix(loss=f"{mean_loss:.3f}")
    return float(state["running"]) / offset


# %% 6. The prior -----------------------------------------------------------------------------------
# The VAE is trained; now draw z from N(0, I) and decode it: fog. Why? Training pulls each q(z | x, c) towards
# N(0, I), one picture at a time, and stops where the picture would suffer. Nothing makes the codes of all
# photographs together, the aggregated posterior, look like N(0, I). In it neighbouring cells agree (sky
# beside sky), and it depends on c. N(0, I) knows neither, so its draws are codes that no picture ever had.
# (train draws both as prior.png.) The cure is to learn the distribution of the codes: p(z | c).
#
# Flow matching (Lipman et al. 2023, arXiv 2210.02747; Liu et al. 2023, arXiv 2209.03003) learns it by
# regression. Join a code z and a noise e by a straight line, and walk along it with time t:
#
#     z_t = (1 - t) z + t e          t = 0: a code, t = 1: noise          velocity  dz_t / dt = e - z
#
# A network sees z_t, t and c, and guesses the velocity. Many lines cross at z_t, so the best guess is the
# mean of their velocities, and a theorem says: whoever starts at pure noise and follows these means back
# to t = 0 ends in a draw from p(z | c). That is all of sampling.
#
# The network is a small transformer (DiT, Peebles & Xie 2023, arXiv 2212.09748): each 2x2 patch of the grid
# is a token (cells would be four times the work), and by attention all patches agree. A flat code is one.

TIME = 64  # numbers that describe the time t
HEAD = 64  # width of an attention head
DEPTH = 6  # transformer blocks


class Block(nn.Module):
    """A transformer block that time and condition steer (adaLN-zero, from DiT).

    Tokens (N, T, W) and a steering vector (N, W) -> tokens (N, T, W). The vector says for attention and for
    the dense half how to shift and scale what goes in, and how much of what comes out to add: at first none.
    """

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.steer = nn.Linear(width, 6 * width)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.from_heads = nn.Linear(width, width)
        hidden = 64 * round(width / 24)  # two thirds of 4 W, in 64s: SwiGLU has three matrices, not two
        self.widen = nn.Linear(width, 2 * hidden)
        self.narrow = nn.Linear(hidden, width)
        nn.init.zeros_(self.steer.weight)
        nn.init.zeros_(self.steer.bias)

    def forward(self, h, steering):
        shift_a, scale_a, gate_a, shift_d, scale_d, gate_d = self.steer(steering)[:, None].chunk(6, dim=2)
        normed = F.layer_norm(h, (self.width,)) * (1 + scale_a) + shift_a               # (N, T, W)
        q, k, v = self.to_qkv(normed).unflatten(2, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)  # (N, heads, T, 64)
        mixed = F.scaled_dot_product_attention(q, k, v)  # softmax(q k' / 8) v: each token asks all others
        h = h + gate_a * self.from_heads(mixed.transpose(1, 2).flatten(2))
        normed = F.layer_norm(h, (self.width,)) * (1 + scale_d) + shift_d
        what, how_much = self.widen(normed).chunk(2, dim=2)  # SwiGLU (arXiv 2002.05202): (N, T, hidden) each
        return h + gate_d * self.narrow(what * F.silu(how_much))


class Flow(nn.Module):
    """The velocity network. shape: (C, s, s) of a code; width: W of the transformer; detour: see forward."""

    def __init__(self, shape, condition_dim, width, detour=False):
        super().__init__()
        channels, side, _ = shape
        self.shape, self.width, self.detour = shape, width, detour
        self.patch = 2 if side > 1 else 1
        numbers = channels * self.patch**2                       # in one token
        self.condition = Condition(condition_dim, width)
        self.time = nn.Sequential(nn.Linear(TIME, width), nn.SiLU(), nn.Linear(width, width))
        self.to_tokens = nn.Linear(numbers, width)
        self.position = nn.Parameter(0.02 * torch.randn((side // self.patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(DEPTH))
        self.guess = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, condition_dim))
        self.steer = nn.Linear(width, 2 * width)
        self.to_velocity = nn.Linear(width, numbers)
        for layer in (self.steer, self.to_velocity):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        # where the codes lie: the flow works on codes of mean 0 and variance 1 in each channel, as noise has,
        # so that the middle of the way is a fair mixture of the two
        self.register_buffer("center", torch.zeros(channels, 1, 1))
        self.register_buffer("scale", torch.ones(channels, 1, 1))

    def forward(self, z, t, embedding, kind):
        """Noisy codes (N, C, s, s), times (N,), conditions -> velocities, a guess of the picture (N, D)."""
        h = F.pixel_unshuffle(z, self.patch)                                            # (N, 4C, s/2, s/2)
        grid = h.shape[2:]
        h = self.to_tokens(h.flatten(2).transpose(1, 2)) + self.position                # (N, T, W)
        # t as waves, fast to slow, as if it were a position in a text, from 0 to 1000 (arXiv 1706.03762)
        speed = torch.exp(-math.log(10000) * torch.linspace(0, 1, TIME // 2, device=t.device))
        waves = 1000 * t[:, None] * speed
        time = self.time(torch.cat([waves.sin(), waves.cos()], dim=1))                  # (N, W)
        steering = F.silu(time + self.condition(embedding, kind))                       # (N, W)
        detour = self.detour and self.training
        for number, block in enumerate(self.blocks):
            if detour and number == 1:
                # half of the tokens, others each time, go around the middle blocks (TREAD, arXiv 2501.04765),
                # a third faster. In sampling all of them go through all blocks, and photographs don't mind
                shuffled = torch.rand(h.shape[:2], device=h.device).argsort(1)          # (N, T)
                some = shuffled[:, ::2, None].expand(-1, -1, self.width)                # (N, T / 2, W)
                everyone, h = h, h.gather(1, some)
            if detour and number == DEPTH - 1:
                h = everyone.scatter(1, some, h)                                        # (N, T, W)
            h = block(h, steering)
            if number == DEPTH // 2 - 1:  # half-way: what will CLIP say of the picture? See flow_loss
                guess = self.guess(h.mean(1))                                           # (N, D)
        shift, scale = self.steer(steering)[:, None].chunk(2, dim=2)
        h = self.to_velocity(F.layer_norm(h, (self.width,)) * (1 + scale) + shift)      # (N, T, 4C)
        return F.pixel_shuffle(h.transpose(1, 2).unflatten(2, grid), self.patch), guess  # (N, C, s, s) again


def flow_loss(flow, z, embedding, kind, picture=None, hint=0.0, drop=0.1):
    """Mean squared error of the guessed velocities of standardised codes z (n, C, s, s): a scalar.

    Three details. Times are logit-normal: the middle of the way, where the guess is hardest, is visited most
    (Esser et al. 2024, arXiv 2403.03206). A tenth of the conditions is dropped, so that the network also
    learns pictures in general; guidance needs that. And the lower half guesses the picture's own embedding
    (n, D), with the weight `hint`: told by CLIP what it shows, it learns sooner (REPA, arXiv 2410.06940).
    """
    t = torch.sigmoid(torch.randn(len(z), 1, 1, 1, device=z.device))                    # (n, 1, 1, 1)
    noise = torch.randn_like(z)
    kind = torch.where(torch.rand(len(z), device=z.device) < drop, NOTHING, kind)
    velocity, guess = flow((1 - t) * z + t * noise, t.flatten(), embedding, kind)
    loss = F.mse_loss(velocity.float(), noise - z)
    return loss + hint * (1 - F.cosine_similarity(guess.float(), picture).mean()) if hint else loss


def prior_part(vae, images, data, config, device, dtype, models):
    """What fit needs to train the prior on the codes of a trained VAE."""
    everyone = torch.arange(len(images), device=device)
    mu, sigma = encode_photographs(vae, images, data, everyone, device, config["flip"])  # once
    rows = rows_of(data, TRAINING)
    torch.manual_seed(config["seed"])
    flow = Flow(vae.shape, config["condition_dim"], config["prior_width"], config["detour"]).to(device)
    some = rows[:3000]  # enough for statistics, and no second copy of everything
    flow.condition.learn_statistics(data, some)
    m, s = mu[some].float(), sigma[some].float()
    flow.center.copy_(m.mean((0, 1, 3, 4))[:, None, None])
    # the variance of all codes is that of their means plus the mean of their variances
    flow.scale.copy_((m.var((0, 1, 3, 4)) + (s**2).mean((0, 1, 3, 4))).sqrt()[:, None, None])

    def draw_code(rows):  # anew at every visit: the prior learns where q puts a picture, not one point of it
        version = torch.randint(mu.shape[1], (len(rows),), device=device)  # mirrored or not
        m, s = mu[rows, version].float(), sigma[rows, version].float()                  # (n, C, s, s)
        return (m + s * torch.randn_like(m) - flow.center) / flow.scale

    with autocast(device, dtype):
        example = draw_code(rows[:64]), torch.rand(len(rows[:64]), device=device)
        forward = compiled(flow, (*example, *draw_condition(data, rows[:64], device)), config["compile"])

    def loss(rows, step, total):
        picture = flow.condition.standardise(data["image_embeddings"][rows], PICTURE)   # (n, D)
        hint = 0.5 * (1 - step / total)  # fades out: in the end it is in the way (arXiv 2505.16792)
        with autocast(device, dtype):
            return flow_loss(forward, draw_code(rows), *draw_condition(data, rows, device), picture, hint)

    unseen = rows_of(data, VALIDATION)

    @torch.no_grad()
    def examine(mean):
        torch.manual_seed(0)
        losses = [flow_loss(mean, draw_code(some), data["caption_embeddings"][some, 0], CAPTION, drop=0.0)
                  for some in unseen.split(256)]
        return {"loss": torch.stack(losses).mean().item()}

    return SimpleNamespace(
        name="prior", network=flow, rows=rows, batch=4 * config["batch"], epochs=config["prior_epochs"],
        rate=config["prior_lr"], option="--prior-lr", loss=loss, examine=examine,
        ignorance=2.5,  # who always guesses zero pays the mean of (e - z)², 1 + 1, and for the picture 0.5
        draw=lambda path, mean: save_samples(path, models, images, data, unseen[:8], device))


@torch.no_grad()
def draw_codes(flow, noise, embedding, kind, guidance, steps):
    """Follow the flow from noise (N, C, s, s) to codes: a list of steps + 1 tensors, the last one codes.

    Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) asks the network with the condition and
    without it, and exaggerates the difference: 1 draws from p(z | c), more than 1 is surer and less varied.
    """
    z, way, before = noise, [noise], None
    times = torch.linspace(1, 0, steps + 1, device=noise.device)
    for t, t_next in zip(times[:-1], times[1:]):
        velocity, _ = flow(z, t.expand(len(z)), embedding, kind)
        if guidance != 1:
            without, _ = flow(z, t.expand(len(z)), embedding, NOTHING)
            velocity = without + guidance * (velocity - without)
        # A straight step (Euler's method) cuts every corner, and the pictures lose their contrast. So we also
        # lean the way the velocity has been turning: the Adams-Bashforth method, of order two, no dearer.
        ahead = velocity if before is None else 1.5 * velocity - 0.5 * before
        z, before = z + (t_next - t) * ahead, velocity
        way.append(z)
    return [z * flow.scale + flow.center for z in way]


# %% 7. Sampling ------------------------------------------------------------------------------------
# A prompt becomes a picture in three steps: CLIP's text encoder makes the condition, the prior draws a code
# for it, the decoder draws the code. `sample --image` starts from CLIP's image encoder instead.
# `--interpolate` keeps the noise and walks from one condition to another. `--rerank` lets CLIP choose.

GUIDANCE = 1.5  # chosen on the validation part, with sureness and variety both in view
STEPS = 16      # more change little


@torch.no_grad()
def generate(models, embedding, kind, noise, guidance=GUIDANCE, steps=STEPS):
    """Draw pictures: embeddings (N, D) of one kind, noise (N, C, s, s) -> (N, 3, S, S) in [0, 1]."""
    pictures = []
    for c, z in zip(embedding.split(64), noise.split(64)):  # few enough at a time for any memory
        if models["prior"]:
            z = draw_codes(models["prior"], z, c, kind, guidance, steps)[-1]
        pictures.append(sharpen(models["vae"].decode(z, c, kind), models["vae"].gain))
    return torch.cat(pictures)


def slerp(a, b, steps):
    """Points on the arc from a (D,) to b (D,): (steps, D). A chord would leave the sphere of embeddings."""
    angle = torch.arccos(F.cosine_similarity(a, b, dim=0).clamp(-1, 1)).clamp(min=1e-4)
    t = torch.linspace(0, 1, steps, device=a.device)[:, None]
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


# %% 8. Evaluation ----------------------------------------------------------------------------------
# A loss says how well pictures are stored, not how well prompts are answered. unCLIP asked people three
# questions. We ask CLIP the same ones, and a fourth, always about the test part, which nothing else has seen:
#
#     does the picture show the caption?   CLIP score, and R-precision: of 100 captions, is its own nearest?
#     do samples of one caption differ?    mean distance between their CLIP embeddings
#     do they look like photographs?       CMMD, a distance between two sets of embeddings
#     are they copies?                     how far it is from a sample to the nearest training picture
#
# Real photographs answer the same questions beside them: a yardstick. And CLIP is a kind judge here, since
# the model was trained on its embeddings. Look at the pictures, too.


def caption_match(images, own, texts):
    """CLIP score, R-precision (arXiv 1711.10485) of embedded pictures (N, D) with captions texts[own]."""
    cosines = images @ texts.T                                                          # (N, captions)
    share = 1 / own.bincount()[own]  # of its caption's vote: all captions count alike
    score, right = cosines.gather(1, own[:, None])[:, 0], (cosines.argmax(1) == own).float()
    mean_score, mean_right = ((share @ values / share.sum()).item() for values in (score, right))
    return {"CLIP score": 100 * mean_score, "R-precision": mean_right}


def diversity(images, own):
    """Mean cosine distance of embedded pictures (N, D) that share a caption; of all, where no two do."""
    same = (own[:, None] == own).fill_diagonal_(False)                                  # (N, N)
    if not same.any():
        same = torch.ones_like(same).fill_diagonal_(False)
    return (1 - images @ images.T)[same].mean().item()


def cmmd(a, b):
    """CMMD (Jayasumana et al. 2024, arXiv 2401.09603) of two sets of unit vectors (N, D), (M, D).

    1000 · MMD² with the kernel exp(-|u - v|² / 2σ²), σ = 10: zero if and only if the distributions agree.
    """

    def kernel(u, v):
        return torch.exp(-torch.cdist(u.cpu().double(), v.cpu().double()).square() / (2 * 10**2)).mean()

    return 1000 * (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)).item()


def nearest(images, others):
    """Distance from each unit vector (N, D) to the nearest of others (M, D), and which it is: (N,), (N,)."""
    cosine, which = torch.cat([some @ others.T for some in images.split(256)]).max(1)
    return 1 - cosine, which


def answer_questions(images, own, texts, reference, training, asked=slice(None)):
    """All four about embedded pictures (N, D), of which images[asked] have captions texts[own]: a dict."""
    return caption_match(images[asked], own, texts) | {
        "diversity": diversity(images[asked], own), "CMMD": cmmd(images, reference),
        "nearest": nearest(images, training)[0].median().item()}


@torch.no_grad()
def measure_samples(models, images, data, clip_model, guidances, steps, seed, device):
    """Ask all four questions about test photographs, and about samples for a hundred of their captions.

    Returns a table {row: figures} and, of the samples at the last guidance, the pictures, how far each is
    from the nearest training photograph, and which that is (a number of the data).
    """
    test, training = rows_of(data, TEST), rows_of(data, TRAINING)
    # photographs are judged at the model's own size, or their sharpness would be what sets them apart
    real = encode_images(clip_model, take(images, test, device))                        # (M, D)
    real_training = torch.cat([encode_images(clip_model, take(images, rows, device)) for rows in
                               tqdm(training.split(256), desc="training photographs", leave=False)])
    # a hundred captions, one of a photograph (a second one would be no wrong answer), of the five in turn
    captions = [data["captions"][row][place % CAPTIONS] for place, row in enumerate(test.tolist())]
    captions = list(dict.fromkeys(captions))[:100]                                      # no two are alike
    texts = encode_texts(clip_model, captions)                                          # (100, D)
    asked = [(place, captions.index(caption)) for place, row in enumerate(test.tolist())
             for caption in dict.fromkeys(data["captions"][row]) if caption in captions]
    place, own = torch.tensor(asked, device=device).T
    table = {"photographs": answer_questions(real, own, texts, real_training, real_training, asked=place)}
    own = torch.arange(len(texts), device=device).repeat_interleave(4)                  # four of each caption
    for guidance in guidances:
        torch.manual_seed(seed)
        noise = torch.randn(len(own), *models["vae"].shape, device=device)
        pictures = generate(models, texts[own], CAPTION, noise, guidance, steps)
        drawn = encode_images(clip_model, pictures)
        table[f"samples, guidance {guidance:g}"] = answer_questions(drawn, own, texts, real, real_training)
    distance, which = nearest(drawn, real_training)
    return table, pictures, distance, training[which]


# %% Appendix A. A toy world --------------------------------------------------------------------------
# Everything above, for those without COCO, CLIP's weights or a GPU: pastures drawn with a few ellipses,
# written as a COCO folder, and a miniature CLIP trained on them, written as a CLIP weights file. From
# there on `demo` calls the same prepare, train, sample and evaluate as everyone else.

SUBJECTS = {"sheep": ("a sheep", "two sheep", "three sheep"), "cow": ("a cow", "two cows", "three cows"),
            "horse": ("a horse", "two horses", "three horses")}
GROUNDS = {"grass": ("on green grass", "in a meadow"), "snow": ("in the snow", "on a snowy field"),
           "field": ("on a bare field", "on brown earth")}
SKIES = {"blue": ("under a blue sky", "on a sunny day"), "grey": ("under a grey sky", "on a cloudy day"),
         "sunset": ("at sunset", "under a red evening sky"), "night": ("at night", "under the stars")}
RELIEFS = {"hills": ("with hills behind", "below a hill"),
           "mountains": ("in front of mountains", "in the mountains")}
# never drawn, neither for CLIP nor for the VAE: what the model makes of these, it composed by itself
UNSEEN = [("cow", "snow", "sunset"), ("sheep", "field", "night"), ("horse", "grass", "grey"),
          ("sheep", "snow", "blue")]
# of the sky the colours at the top and at the horizon
SKY_COLOURS = {"blue": ((60, 130, 225), (175, 215, 245)), "grey": ((135, 140, 146), (190, 193, 196)),
               "sunset": ((120, 70, 130), (255, 160, 70)), "night": ((8, 12, 40), (38, 48, 100))}
GROUND_COLOURS = {"grass": (84, 158, 52), "snow": (236, 241, 249), "field": (156, 108, 62)}
LIGHT = {"blue": (1, 1, 1), "grey": (0.9, 0.9, 0.92), "sunset": (1, 0.86, 0.78), "night": (0.56, 0.6, 0.72)}
# An animal: three colours (coat, dark, pale), where its legs begin, and shapes of one of these colours, in
# units of its width, y upwards negative. Four numbers are an ellipse (centre, radii), more a polygon.
ANIMALS = {
    "sheep": (((246, 240, 222), (30, 28, 28), (225, 216, 196)), -0.3, [
        (0, -.28, -.38, .19, .16), (0, -.12, -.46, .19, .16), (0, .08, -.47, .19, .16),
        (0, .24, -.4, .19, .16), (0, -.2, -.3, .19, .16), (0, 0, -.3, .19, .16), (0, .18, -.3, .19, .16),
        (0, 0, -.36, .34, .18), (2, -.08, -.3, .2, .07), (1, .43, -.47, .1, .13), (1, .36, -.56, .08, .04),
        (0, .36, -.6, .08, .06)]),
    "cow": (((158, 72, 36), (110, 48, 24), (250, 246, 238)), -0.34, [
        (0, 0, -.44, .4, .19), (0, -.36, -.56, .34, -.58, .36, -.34, -.36, -.32), (2, -.18, -.5, .12, .1),
        (2, .12, -.4, .1, .08), (1, -.39, -.52, -.43, -.5, -.44, -.18, -.41, -.18),
        (0, .26, -.6, .42, -.68, .46, -.5, .3, -.4), (0, .46, -.56, .1, .12), (2, .5, -.48, .07, .06),
        (2, .38, -.66, .36, -.78, .43, -.67), (2, .47, -.66, .52, -.77, .52, -.64)]),
    "horse": (((44, 34, 32), (20, 16, 16), (90, 74, 66)), -0.46, [
        (0, 0, -.56, .36, .16), (0, .18, -.6, .36, -.98, .48, -.9, .34, -.48),
        (1, .12, -.66, .32, -1, .38, -.98, .24, -.6), (0, .34, -.98, .44, -1, .62, -.8, .56, -.72, .4, -.84),
        (1, .36, -.98, .38, -1.08, .42, -.98), (1, -.32, -.64, -.46, -.56, -.48, -.22, -.38, -.3)])}


def draw_animal(draw, kind, x, y, width, facing, light):
    """Draw an animal that stands at (x, y), `width` pixels long, facing -1 (left) or 1 (right)."""
    colours, leg_top, shapes = ANIMALS[kind]
    legs = [(1, leg - .04, leg_top, leg + .04, leg_top, leg + .035, 0, leg - .035, 0)
            for leg in (-.3, -.17, .17, .3)]
    for colour, *numbers in legs + shapes:
        fill = tuple(int(value * factor) for value, factor in zip(colours[colour], light))
        if len(numbers) == 4:
            cx, cy, rx, ry = (number * width for number in numbers)
            cx, cy = x + facing * cx, y + cy
            draw.ellipse((cx - rx, cy - ry, cx + rx, cy + ry), fill=fill)
        else:
            corners = zip(numbers[::2], numbers[1::2])
            draw.polygon([(x + facing * px * width, y + py * width) for px, py in corners], fill=fill)


def draw_pasture(scene, seed):
    """Draw a scene, which is all that captions say; the seed settles the rest: a PIL image of 128 pixels."""
    animal, ground, sky, relief, count, side = scene
    dice, light, earth = random.Random(seed), LIGHT[sky], GROUND_COLOURS[ground]
    horizon, variant = dice.uniform(0.45, 0.48) * SIZE, dice.choice((0.0, 0.33, 0.67))  # of three skylines
    top, bottom = np.array(SKY_COLOURS[sky], dtype=float)
    blend = np.clip(np.arange(SIZE) / horizon, 0, 1)[:, None, None]
    rows = (top * (1 - blend) + bottom * blend).repeat(SIZE, axis=1)                    # (128, 128, 3)
    picture = Image.fromarray(rows.astype(np.uint8))
    draw = ImageDraw.Draw(picture)

    def shade(colour, factor=1.0):
        return tuple(min(255, int(value * tint * factor)) for value, tint in zip(colour, light))

    def disc(x, y, r, colour, flat=1.0):  # in units of the picture
        draw.ellipse([SIZE * v for v in (x - r, y - r * flat, x + r, y + r * flat)], fill=colour)

    if sky == "night":
        for number in range(16):  # the same stars every night
            disc(number * 0.618 % 1, 0.03 + number * 0.377 % 0.33, 0.006, (235, 235, 215))
        disc(dice.choice((0.2, 0.5, 0.8)), 0.16, 0.07, (245, 240, 210))
    elif sky == "sunset":
        disc(dice.choice((0.2, 0.5, 0.8)), horizon / SIZE - 0.16, 0.07, (255, 225, 120))
    else:
        cloud, shift = (250, 251, 253) if sky == "blue" else (172, 175, 180), dice.choice((0.0, 0.3, 0.6))
        for place, height, r in ((0.15, 0.13, 0.08), (0.6, 0.2, 0.07)):
            for dx, dy in ((-1.2, 0.3), (0, 0), (1.1, 0.35)):
                disc((place + shift) % 1 + dx * r, height + dy * r, r, cloud, flat=0.6)
    if relief == "mountains":
        for place, height in ((0.1, 0.2), (0.75, 0.18), (0.4, 0.26)):
            x, height = (place + variant) % 1 * SIZE, height * SIZE
            for part, colour in ((1, (106, 112, 132)), (0.3, (240, 243, 248))):  # rock, then a snowy top
                foot, half = horizon - (1 - part) * height, 1.2 * part * height
                draw.polygon([(x - half, foot), (x, horizon - height), (x + half, foot)], fill=shade(colour))
    else:
        for layer, factor in ((0.09, 0.72), (0.04, 0.84)):
            phase = 6.3 * (variant + 5 * layer)
            line = [(x, horizon - layer * SIZE * (1 + 0.8 * math.sin(phase + 18 * x / SIZE)))
                    for x in range(0, SIZE + 4, 4)]
            draw.polygon([*line, (SIZE, SIZE), (0, SIZE)], fill=shade(earth, factor))
    draw.rectangle((0, horizon, SIZE, SIZE), fill=shade(earth))
    width = (0.56, 0.44, 0.34)[count - 1] * SIZE
    for place in {1: [0.32 if side == "left" else 0.68], 2: [0.26, 0.74], 3: [0.18, 0.5, 0.82]}[count]:
        x, y = (place + dice.uniform(-0.015, 0.015)) * SIZE, dice.uniform(0.87, 0.9) * SIZE
        draw_animal(draw, animal, x, y, width, 1 if side == "left" else -1, light)
    return picture


def caption_pasture(scene, dice):
    """Five captions of a scene, the first one the shortest full description."""
    animal, ground, sky, relief, count, side = scene
    subject, where = SUBJECTS[animal][count - 1], f"on the {side}" if count == 1 else "side by side"
    words = GROUNDS[ground], SKIES[sky], RELIEFS[relief]
    grounds, skies, reliefs = (dice.sample(both, 2) for both in words)
    return [f"{subject} {GROUNDS[ground][0]} {SKIES[sky][0]}",
            f"{subject} {grounds[0]} {skies[0]}, {reliefs[0]}",
            f"{subject} {skies[1]}, {where}, {grounds[1]}", f"{subject} {grounds[0]} {reliefs[1]}",
            f"{skies[0]}, {subject} {grounds[1]}"]


def random_scene(dice):
    """A scene whose combination of animal, ground and sky is not one of the unseen."""
    while True:
        scene = [dice.choice(list(options)) for options in (SUBJECTS, GROUNDS, SKIES, RELIEFS)]
        if tuple(scene[:3]) not in UNSEEN:
            return *scene, dice.randint(1, 3), dice.choice(("left", "right"))


def draw_toy_world(root, count=3000):
    """Write the toy world as a COCO folder: root/toy/*.jpg and root/annotations/captions_toy.json."""
    dice, images, annotations = random.Random(0), [], []
    for number in tqdm(range(count), desc="drawing pastures", unit="img"):
        scene, name = random_scene(dice), f"{number:012}.jpg"
        with atomic(root / "toy" / name) as temporary:
            draw_pasture(scene, seed=number).save(temporary, quality=95)
        images.append({"id": number, "file_name": name, "width": SIZE, "height": SIZE})
        annotations += [{"image_id": number, "caption": text} for text in caption_pasture(scene, dice)]
    with atomic(root / "annotations/captions_toy.json") as temporary:  # last: it says that all is drawn
        temporary.write_text(json.dumps({"images": images, "annotations": annotations}))


def train_toy_clip(root, path, steps=400, batch=128):
    """Train a miniature CLIP on the toy world, with CLIP's own loss; save it for clip.load."""
    import clip
    from clip.model import CLIP
    photographs = read_captions(root / "annotations/captions_toy.json", SUBJECTS)
    pixels = torch.stack([centre_square(decode(root / "toy" / p["file_name"], 48), 48)
                          for p in tqdm(photographs, desc="reading pastures", unit="img")])
    pixels = (pixels / 255 - CLIP_MEAN) / CLIP_STD                                      # (N, 3, 48, 48)
    texts = [caption for p in photographs for caption in p["captions"]]
    tokens = clip.tokenize(texts, 24).view(len(photographs), CAPTIONS, 24)              # (N, 5, 24)
    torch.manual_seed(0)
    model = CLIP(embed_dim=32, image_resolution=48, vision_layers=2, vision_width=64, vision_patch_size=8,
                 context_length=24, vocab_size=49408, transformer_width=64, transformer_heads=1,
                 transformer_layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in tqdm(range(steps), desc="training a miniature CLIP"):
        index, target = torch.randint(len(pixels), (batch,)), torch.arange(batch)
        # every picture against every caption of the batch: the pairs are on the diagonal
        logits, _ = model(pixels[index], tokens[index, torch.randint(CAPTIONS, (batch,))])  # (n, n)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with atomic(path) as temporary:
        torch.save(model.state_dict(), temporary)


# %% Appendix B. Devices, files, downloads ------------------------------------------------------------

def choose_device(wish=None):
    """The device that was wished for, or the fastest that PyTorch sees."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [name for name in there if there[name]]
    if wish and wish not in available:
        raise Stop(f"PyTorch sees no {wish} device here; --device takes one of: {', '.join(available)}.")
    return torch.device(wish or available[0])


def choose_precision(device, wish=None):
    """The number format of convolutions and matrix products, by default the fastest that serves.

    bfloat16 has float32's range and needs no care. float16 is what an older card (Colab's T4) computes
    fast; its range is small, so fit scales the loss. Losses and normalisations stay in float32.
    """
    possible = {"cuda": ["bfloat16", "float16", "float32"], "mps": ["float32"],
                "cpu": ["float32", "bfloat16", "float16"]}[device.type]
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        possible.remove("bfloat16")  # a T4 only emulates it, slowly
    capable = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16")
    if device.type == "cpu" and capable and torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        possible = ["bfloat16", "float32", "float16"]  # it has the instructions, and PyTorch may use them
    if wish and wish not in possible:
        raise Stop(f"This {device.type} device can't compute in {wish}; --precision takes one of: "
                   f"{', '.join(possible)}.")
    return getattr(torch, wish or possible[0])


def autocast(device, dtype):
    """Within this context convolutions and matrix products compute in dtype."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# Expected failures, and files that are never half written ------------------------------------------

class Stop(Exception):
    """An expected failure. Its text says what happened and what to do; main() prints just that."""


def first_line(error):
    """The first line of an exception's text, or its name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


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


def must_be_writable(folder, file=None):
    """Try to write before the work, not after it. Raises Stop with the real reason."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise Stop(f"Nothing can be written in {folder}: {error.strerror}.") from error
    if file and file.is_dir():
        raise Stop(f"{file} is a folder, not a file that could be written.")


VERSIONS = {"data file": 2, "checkpoint": 7}  # of the two kinds of files that save writes and load reads


def save(content, path, kind):
    """Write a dict of tensors, numbers and strings to `path`, atomically."""
    try:
        with atomic(path) as temporary:
            torch.save({"kind": kind, "version": VERSIONS[kind], **content}, temporary)
    except (OSError, RuntimeError) as error:  # a full disk is either, depending on where it strikes
        raise Stop(f"{path} could not be written ({first_line(error)}). What was there before is "
                   "untouched; free some disk space and run the same command again.") from error


def load(path, kind):
    """Read a file that `save` wrote and check that it is of this kind and of today's version.

    weights_only=True reads tensors and plain containers and runs no code, whatever the file holds.
    mmap=True maps the file: pages are read when they are first touched. testzip compares the check sums.
    """
    anew = f"python cvae.py {'prepare' if kind == 'data file' else 'train'}"
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} has changed since it was written")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise Stop(f"There is no {kind} at {path}; make one first: {anew}") from None
    except Exception as error:  # torch reports damage with half a dozen exception types
        raise Stop(f"{path} is no readable {kind}: damaged, cut short, or not written by this program "
                   f"({first_line(error)}).") from error
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise Stop(f"{path} is not a {kind} of this program.")
    if content["version"] != VERSIONS[kind]:
        raise Stop(f"{path} is a {kind} of version {content['version']}; this program reads version "
                   f"{VERSIONS[kind]}. Make it anew: {anew}")
    return content


# Reading captions, photographs and CLIP ------------------------------------------------------------

def as_id(value):
    """An id as text, so that 7, 7.0 and "7" are the same photograph. Names are ids, too."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or value != value:
        raise ValueError(f"{value!r} is no id")
    return str(int(value) if isinstance(value, float) else value).strip()


def read_records(path):
    """Images and annotations of a COCO captions file; those that can't be read are counted and left out."""
    try:
        content = json.loads(Path(path).read_bytes())
        listed = list(content["images"]), list(content["annotations"])
    except FileNotFoundError:
        raise Stop(f"There is no captions file at {path}; see --coco and --split.") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Stop(f"{path} is not a COCO captions file ({error!r:.200}).") from error
    fields = {field for record in listed[1] if isinstance(record, dict) for field in record}
    if "caption" not in fields and "category_id" in fields:
        raise Stop(f"{path} holds COCO's instances (outlines), not captions; take captions_... beside it.")
    images, annotations, total = [], [], len(listed[0]) + len(listed[1])
    unreadable = contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, OverflowError)
    for record in listed[0]:
        with unreadable:
            size = int(record["width"]), int(record["height"])
            if min(size) > 0 and isinstance(record["file_name"], str):
                images.append({"id": as_id(record["id"]), "file_name": record["file_name"], "size": size})
    for record in listed[1]:
        with unreadable:
            if caption := record["caption"].strip():
                annotations.append({"image_id": as_id(record["image_id"]), "caption": caption})
    bad = total - len(images) - len(annotations)
    if bad > 0.05 * total:
        raise Stop(f"{path} is not a COCO captions file: {bad} of its {total} records can't be read.")
    if bad:
        print(f"{bad} of {total} records in {path} lack an id, caption, name or size: skipped.")
    for image in images:  # a name from a file is a place below a folder, not a path to anywhere
        if not re.fullmatch(r"(\w[\w .()+-]*/)*\w[\w .()+-]*", image["file_name"]):
            raise Stop(f"{path} names a photograph {image['file_name']!r}, which is not a plain file name.")
    return images, annotations


def decode(path, box):
    """Open a photograph as a PIL RGB image, no smaller than it takes to make a square of `box` pixels.

    Raises OSError or ValueError for whatever is not a whole, sane picture.
    """
    try:
        with Image.open(path) as photograph:
            if photograph.width * photograph.height > Image.MAX_IMAGE_PIXELS:  # Pillow refuses at twice that
                raise ValueError(f"{photograph.width} x {photograph.height} pixels: a decompression bomb?")
            photograph.draft("RGB", (box, box))  # JPEG can decode straight to 1/2, 1/4, 1/8: much faster
            photograph.load()
            if photograph.mode.startswith("I"):  # 16-bit grey: Pillow would clip it to white
                photograph = Image.fromarray((np.asarray(photograph) // 257).astype(np.uint8))
            return ImageOps.exif_transpose(photograph).convert("RGB")
    except (Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(first_line(error)) from error


def load_clip(name, device="cpu"):
    """CLIP by model name ("ViT-B/32": fetched once to ~/.cache/clip) or by the path of its weights.

    On CUDA the model computes in half precision. Raises Stop when the weights can't be had.
    """
    import clip
    try:
        model = clip.load(name, device=device)[0]
    except Exception as error:
        raise Stop(f"CLIP {name} could not be loaded ({first_line(error)}). --clip takes a file of CLIP "
                   f"weights or one of {', '.join(clip.available_models())}, whose weights come from "
                   "openaipublic.azureedge.net to ~/.cache/clip.") from error
    return model if torch.device(device).type == "cuda" else model.float()


def clip_fingerprint(model):
    """A short hash of a CLIP's weights: embeddings of two different CLIPs must never be mixed."""
    return hashlib.sha256(model.text_projection.detach().cpu().half().numpy().tobytes()).hexdigest()[:16]


def embed_photographs(model, paths, device, batch=32):
    """Decode photographs and embed them with CLIP, as fast as the hardware allows.

    Returns the indices of the readable ones, their pixels uint8 (M, 3, 128, 128), their embeddings (M, D).
    """
    side, cores = model.visual.input_resolution, torch.get_num_threads()

    def work(some):
        squares, problems = [], []
        for number, path in enumerate(some):
            try:
                photograph = decode(path, max(side, SIZE))
                squares.append((number, centre_square(photograph, side), centre_square(photograph, SIZE)))
            except (OSError, ValueError) as error:
                problems.append(f"{path}: {first_line(error)}")
        if not squares:
            return [], problems, None, None
        good, for_clip, for_vae = zip(*squares)
        return good, problems, torch.stack(for_vae), encode_images(model, torch.stack(for_clip).to(device))

    # Each core works through batches of its own. Threads that share a batch wait for each other after
    # every layer, longest when one of them has just lost its core to the decoding of the next batch. Decoding
    # holds Python's lock for a twentieth of its time, so that threads will do, and notebooks can start them.
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(cores)
    batches = [paths[start:start + batch] for start in range(0, len(paths), batch)]
    images = torch.zeros(len(paths), 3, SIZE, SIZE, dtype=torch.uint8)  # one array, filled as pictures arrive
    kept, embeddings = [], []
    try:
        with tqdm(total=len(paths), desc="CLIP, images", unit="img") as bar:
            for good, problems, for_vae, embedding in pool.map(work, batches):
                for problem in problems:
                    tqdm.write(f"skipped: {problem}")
                if good:
                    images[len(kept):len(kept) + len(good)] = for_vae
                    kept += [bar.n + number for number in good]
                    embeddings.append(embedding)
                bar.update(len(good) + len(problems))
    finally:  # also on Ctrl-C: what has not started never does
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)
    if not kept:
        raise Stop("None of the photographs is there and can be read.")
    return kept, images[:len(kept)], torch.cat(embeddings).cpu()


# Data files, and what training asks of them --------------------------------------------------------

DATA = "data/data.pt"  # where prepare writes and train reads


def load_data(path, device=CPU, fingerprint=None):
    """The data file that `prepare` wrote. Pictures stay memory-mapped, embeddings go to the device.

    Raises Stop if it is not the data with this fingerprint, a trained run's.
    """
    data = load(path, "data file")
    if fingerprint and data["fingerprint"] != fingerprint:
        raise Stop(f"{path} is not the data that this run was trained on (other photographs, another CLIP). "
                   "If that data has moved, say where it is: --data FILE.")
    return data | {name: data[name].to(device) for name in ("image_embeddings", "caption_embeddings", "part")}


def rows_of(data, part):
    """The numbers of the photographs in one part of the data: (n,)."""
    return (data["part"] == part).nonzero()[:, 0]


def pool_images(images, size):
    """uint8 (N, 3, 128, 128) -> uint8 (N, 3, size, size), by averaging."""
    if images.shape[-1] == size:
        return images
    factor = images.shape[-1] // size
    return torch.cat([F.avg_pool2d(some.float(), factor).round().byte() for some in images.split(1024)])


def to_device(images, device):
    """Put the whole tensor on the device; what would fill over half of a card's free memory stays in RAM."""
    if device.type == "cuda" and images.nbytes > 0.5 * torch.cuda.mem_get_info()[0]:
        print(f"{images.nbytes / 1e9:.1f} GB of pictures stay in host memory; batches are copied as needed.")
        return images
    return images.to(device)


def take(images, rows, device):
    """Pictures by number as floats in [0, 1], channels last (faster convolutions): (n, 3, S, S)."""
    batch = images[rows.to(images.device)]
    if device.type == "cuda" and batch.device != device:
        batch = batch.pin_memory()  # page-locked, so that the copy runs beside the arithmetic
    batch = batch.to(device, non_blocking=True)
    return (batch.float() / 255).contiguous(memory_format=torch.channels_last)


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


@torch.no_grad()
def encode_photographs(vae, images, data, rows, device, flip=False):
    """Where the encoder puts photographs, and their mirror images: mu, sigma (n, 1 or 2, C, s, s) in float16.

    Half the memory of float32: without it the codes of many photographs would fill more than their pixels.
    """
    mu = torch.empty(len(rows), 2 if flip else 1, *vae.shape, device=device, dtype=torch.float16)
    sigma = torch.empty_like(mu)
    places = torch.arange(len(rows), device=device)
    for place in tqdm(places.split(64), desc="encoding photographs", leave=False):
        x = take(images, rows[place], device)
        for version, seen in enumerate([x, x.flip(3)] if flip else [x]):
            mean, logvar = vae.encode(seen, data["image_embeddings"][rows[place]], PICTURE)
            mu[place, version], sigma[place, version] = mean.half(), torch.exp(0.5 * logvar).half()
    return mu, sigma


@contextlib.contextmanager
def noted_interrupts():
    """Within the block Ctrl-C only leaves a note in this list, so that a step can be finished first."""
    notes = []
    previous = signal.signal(signal.SIGINT, lambda *_: notes.append(True))
    try:
        yield notes
    finally:
        signal.signal(signal.SIGINT, previous)


def compiled(network, example, wanted):
    """The network, compiled by torch.compile and proven by one call; as it is where it can't be.

    wanted: True, False, or None for what usually pays: yes on CUDA, no on a processor.
    """
    on_cuda = example[0].device.type == "cuda"
    if not (on_cuda if wanted is None else wanted):
        return network
    if on_cuda:
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32
    print("compiling the network; this takes about a minute")
    try:
        forward = torch.compile(network)
        output = forward(*example)
        sum(part.float().mean() for part in (output if isinstance(output, tuple) else [output])).backward()
        return forward
    except Exception as error:  # no C compiler, no Triton, ...: the lesson goes on, slower
        print(f"torch.compile can't be used here ({first_line(error)}); training goes on without it.")
        return network
    finally:
        network.zero_grad()  # also where the backward pass broke off half-way


def must_be_sane(loss, part, run="The run", ignorance=math.inf):
    """Stop a training whose loss is no number any more, or is worse than that of knowing nothing."""
    if not math.isfinite(loss):
        raise Stop(f"The loss became NaN. {run} keeps its last good checkpoint; start anew with a lower "
                   f"rate, such as {part.option} {part.rate / 2:g}.")
    if loss > ignorance:
        raise Stop(f"Training diverged: its loss is {loss:.3g}, and knowing nothing costs {ignorance:.3g}. "
                   f"{run} keeps its best checkpoint; start anew with a lower rate, such as {part.option} "
                   f"{part.rate / 3:.1g}.")


# Runs and checkpoints ------------------------------------------------------------------------------

def save_checkpoint(path, config, models, history, training=None):
    """Write what sampling needs and, in last.pt, what resuming needs besides."""
    weights = {name: network and network.state_dict() for name, network in models.items()}
    save({"config": config, "history": history, "training": training, **weights}, path, "checkpoint")


def checkpoint_path(name, file="best.pt"):
    """The checkpoint that the user named, by its own path or its run folder; by default the newest run's."""
    if name:
        return Path(name) / file if Path(name).is_dir() else Path(name)
    files = sorted(Path("runs").glob(f"*/{file}"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise Stop("There is no trained model in runs/ yet; train one first: python cvae.py train")
    return files[-1]


def claim_run(run, config):
    """Make a run's folder, and fail if it is there: two trainings never share one."""
    stamp = f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{config['size']}-{config['latents']}-{config['prior']}"
    for name in [run] if run else [stamp, *(f"{stamp}-{number}" for number in range(2, 100))]:
        folder = Path(name)
        try:
            folder.mkdir(parents=True)
            must_be_writable(folder)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise Stop(f"{folder} can't be made: {error.strerror}.") from error
    raise Stop(f"{folder} can't be made, it exists already. Remove it, or choose another --run.")


def epochs_left(config, history):
    """Epochs that a run has still to train, those of both parts together."""
    wanted = config["epochs"] + (config["prior_epochs"] if config["prior"] == "flow" else 0)
    return wanted - len(history["vae"]) - len(history["prior"])


def open_run(args):
    """A new run's folder and configuration, or a resumed one's: run, config, checkpoint (None if new)."""
    given = {name: value for name, value in vars(args).items() if name in DEFAULTS and value is not None}
    if not args.resume:
        if args.run and (Path(args.run) / "last.pt").exists():
            raise Stop(f"{args.run} already holds a run. Continue it with --resume, or choose another --run.")
        return args.run, DEFAULTS | given, None
    run = Path(args.run) if args.run else checkpoint_path(None, "last.pt").parent
    checkpoint = load(run / "last.pt", "checkpoint")  # no other: best.pt can't say how far the training was
    config = checkpoint["config"]
    for name, value in given.items():
        option = "--" + name.replace("_", "-")
        if value != config[name] and name not in CHANGEABLE:
            raise Stop(f"{run} was started with {option} {config[name]}, and that can't change on the way. "
                       "Leave the option out, or start a new run.")
        if name == "epochs" and value != config[name] and checkpoint["training"]["part"] == "prior":
            raise Stop(f"The prior of {run} has begun to learn this VAE's codes, so the VAE can't be trained "
                       "longer; the prior can (--prior-epochs).")
        if name in ("epochs", "prior_epochs") and value < config[name]:
            raise Stop(f"{run} is set to {config[name]} epochs; {option} can only make it longer.")
    config |= given
    if epochs_left(config, checkpoint["history"]) == 0:
        more = "prior-epochs" if config["prior"] == "flow" else "epochs"
        raise Stop(f"{run} is finished, there is nothing left to do. To train it longer: --resume --{more} "
                   f"{2 * config[more.replace('-', '_')]}.")
    return run, config, checkpoint


def load_models(path, device):
    """A trained run, ready to sample: {"vae", "prior" (None: use N(0, I))} and its configuration."""
    checkpoint = load(path, "checkpoint")
    config = checkpoint["config"]
    vae = VAE(config["size"], config["condition_dim"], config["latents"], channels=config["channels"])
    models = {"vae": vae.to(memory_format=torch.channels_last), "prior": None}
    if checkpoint["prior"]:
        models["prior"] = Flow(vae.shape, config["condition_dim"], config["prior_width"])
    for name, network in models.items():
        if network:
            network.to(device).eval().load_state_dict(checkpoint[name])
    return models, config


def flow_options(args, models):
    """--guidance and --steps, which are refused where there is no flow to guide."""
    given = args.guidance is not None or args.steps is not None or getattr(args, "show_steps", False)
    if given and not models["prior"]:
        raise Stop("--guidance, --steps and --show-steps are for a learned prior, and this model has none.")
    return GUIDANCE if args.guidance is None else args.guidance, args.steps or STEPS


def load_clip_of(config, device, name=None):
    """The CLIP that a run was trained with. Raises Stop when `name` is another one."""
    clip_model = load_clip(name or config["clip"], device)
    if clip_fingerprint(clip_model) != config["clip_fingerprint"]:
        raise Stop(f"{name or config['clip']} is not the CLIP that this model was trained with "
                   f"({config['clip']}).")
    return clip_model


# Prompts and pictures ------------------------------------------------------------------------------

def read_wishes(args, clip_model, device):
    """What to draw, a row each: a list of (label, embedding (1, D), kind). Says when CLIP cuts a prompt."""
    import clip
    wishes = []
    if args.image:
        side = clip_model.visual.input_resolution
        try:
            square = centre_square(decode(args.image, side), side)[None].to(device)
        except (OSError, ValueError) as error:
            raise Stop(f"{args.image} is no picture that can be read ({first_line(error)}).") from error
        wishes.append((f"variations of {Path(args.image).name}", encode_images(clip_model, square), PICTURE))
    for prompt in args.prompts:
        if not prompt.strip():
            raise Stop("A prompt is empty; say what the picture should show.")
        try:
            clip.tokenize([prompt], clip_model.context_length)
        except RuntimeError:
            print(f"CLIP reads {clip_model.context_length} tokens; this prompt is longer and was cut: "
                  f"{prompt[:60]}...")
        wishes.append((prompt, encode_texts(clip_model, [prompt]), CAPTION))
    return wishes


def sample_path(folder, label):
    """A new file name in `folder`, made of the label's letters and digits of any script, and nothing else."""
    text = unicodedata.normalize("NFKC", label).lower()
    text = "".join(c if unicodedata.category(c)[0] in "LMN" else "-" for c in text)
    name = re.sub("-+", "-", text).encode()[:120].decode(errors="ignore").strip("-") or "sample"
    if re.fullmatch(r"con|prn|aux|nul|(com|lpt)\d", name):  # these name devices on Windows
        name = f"sample-{name}"
    path, number = Path(folder) / f"{name}.png", 2
    while path.exists():
        path, number = Path(folder) / f"{name}-{number}.png", number + 1
    return path


@contextlib.contextmanager
def new_figure(path, rows, columns, size):
    """The axes (rows, columns) of a figure of size (w, h) inches, written to `path` when the block ends."""
    from matplotlib.figure import Figure  # not pyplot, which wants windows, and its figures closed
    figure = Figure(size)
    yield figure.subplots(rows, columns, squeeze=False)
    figure.tight_layout(pad=0.3)
    with atomic(path) as temporary:  # compress_level 1: a quarter of the time for a fifth more bytes
        figure.savefig(temporary, dpi=150, format="png", pil_kwargs={"compress_level": 1})


def save_grid(path, rows, labels):
    """Draw rows of pictures, each (n, 3, S, S) in [0, 1], with a label above each row, as a PNG."""
    from torchvision.utils import make_grid
    width = max(1.35 * max(len(row) for row in rows), 4)  # inches
    limit = int(14 * width)
    with new_figure(path, len(rows), 1, (width, 1.65 * len(rows))) as axes:
        for axis, row, label in zip(axes[:, 0], rows, labels):
            strip = make_grid(row.float().cpu(), nrow=len(row), padding=2, pad_value=1.0)
            axis.imshow(strip.permute(1, 2, 0).numpy(), interpolation="bicubic")
            axis.set_title(label if len(label) <= limit else label[:limit] + " ...", fontsize=9,
                           loc="left", pad=3, parse_math=False)
            axis.axis("off")
            axis.set_anchor("W")


@torch.no_grad()
def save_reconstructions(path, vae, images, data, rows, device):
    """Draw photographs of the data, above what the VAE makes of them."""
    x = take(images, rows, device)
    picture = vae(x, data["image_embeddings"][rows], PICTURE)[0]
    save_grid(path, [x, picture, sharpen(picture, vae.gain)],
              ["photographs", "reconstructions", "the same, sharpened"])


@torch.no_grad()
def save_samples(path, models, images, data, rows, device):
    """Draw photographs of the data, and below them eight samples for each of the first three's captions."""
    pictures = [take(images, rows, device)]
    for text in data["caption_embeddings"][rows[:3], 0]:                                # (D,)
        torch.manual_seed(0)
        noise = torch.randn(8, *models["vae"].shape, device=device)
        pictures.append(generate(models, text.expand(8, -1), CAPTION, noise))
    save_grid(path, pictures, ["photographs", *(data["captions"][row][0] for row in rows[:3].tolist())])


@torch.no_grad()
def save_comparison(path, runs, prompts, device):
    """Four rows of samples for the same prompts: flat or grid codes (the runs), N(0, I) or flow as prior."""
    rows, labels = [], []
    for latents, run in runs.items():
        models, config = load_models(Path(run) / "best.pt", device)
        texts = encode_texts(load_clip_of(config, device), prompts)
        for name, prior in (("N(0, I)", None), ("the flow", models["prior"])):
            torch.manual_seed(0)
            noise = torch.randn(len(prompts), *models["vae"].shape, device=device)
            rows.append(generate(models | {"prior": prior}, texts, CAPTION, noise))
            labels.append(f"{latents} code, drawn from {name}")
    save_grid(path, rows, labels)


def save_curves(path, history):
    """Draw the losses of both parts, epoch by epoch."""
    parts = [(name, epochs) for name, epochs in history.items() if epochs]
    with new_figure(path, 1, len(parts), (4.5 * len(parts), 3.5)) as axes:
        for axis, (name, epochs) in zip(axes[0], parts):
            for key, label in (("train_loss", "training"), ("loss", "validation")):
                axis.plot(range(1, len(epochs) + 1), [epoch[key] for epoch in epochs], label=label)
            axis.set(xlabel="epoch", title=f"loss of the {name}")
            axis.legend()


@torch.no_grad()
def save_prior_picture(path, models, images, data, device):
    """Show why a prior must be learned: codes of photographs, draws from N(0, I), draws from the flow.

    All three are seen along the two directions in which the codes of photographs vary most.
    """
    rows = rows_of(data, TRAINING)[:500]
    mu, sigma = (t[:, 0].float() for t in encode_photographs(models["vae"], images, data, rows, device))
    torch.manual_seed(0)
    noise = torch.randn_like(mu)
    names, clouds = ["codes of photographs", "draws from N(0, I)"], [mu + sigma * torch.randn_like(mu), noise]
    if models["prior"]:
        texts = data["caption_embeddings"][rows, 0].split(64)
        names.append("draws from the flow")
        clouds.append(torch.cat([draw_codes(models["prior"], z, c, CAPTION, 1, STEPS)[-1]
                                 for z, c in zip(noise.split(64), texts)]))
    clouds = torch.stack(clouds).flatten(2).float().cpu()                               # (3, 500, C s s)
    center = clouds[0].mean(0)
    _, _, directions = torch.linalg.svd(clouds[0] - center, full_matrices=False)        # principal directions
    seen = (clouds - center) @ directions[:2].T                                         # (3, 500, 2)
    limit = 1.1 * seen.abs().max().item()
    with new_figure(path, 1, len(names), (3.2 * len(names), 3.4)) as axes:
        for axis, name, points in zip(axes[0], names, seen):
            axis.scatter(*points.T.numpy(), s=3, alpha=0.5)
            axis.set(title=name, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")


# Downloads -----------------------------------------------------------------------------------------

ATTEMPTS, TIMEOUT = 4, 10  # tries per file; seconds without a byte before a connection counts as dead
DISK_FULL = errno.ENOSPC, errno.EDQUOT
COCO_URL = "http://images.cocodataset.org"  # plain http: its certificate does not match its name


def fetch(url, path, check, progress=None):
    """Download `url` to `path`: retried with back-off, checked, renamed into place only when whole.

    check(temporary path) raises ValueError for content that was not wanted; progress(blocks, their size,
    total) hears how it goes. Raises Stop for an address that is not http(s), OSError after the last attempt.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise Stop(f"{url!r} is not an http or https address; it was not opened.")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with atomic(path) as temporary:
                urllib.request.urlretrieve(url, temporary, progress)  # raises where bytes are missing
                check(temporary)
            return
        except (OSError, ValueError, http.client.HTTPException) as error:
            gone = getattr(error, "code", None) in (401, 403, 404, 410)
            number = getattr(error, "errno", None)
            if attempt == ATTEMPTS or gone or number in DISK_FULL:  # trying again would not help
                raise OSError(number, f"{url}: {first_line(error)}") from error
        time.sleep(0.3 * 2**attempt)  # 0.6, 1.2, 2.4 s: a busy server is given time to recover


def fetch_annotations(path, base_url):
    """Fetch COCO's annotations archive and take out the captions file `path`, if it is not there yet."""
    if path.exists():
        return
    archive = path.with_name("annotations_trainval2017.zip")

    def take_out(temporary):  # one member, by its name: the archive's own names are never used as paths
        try:
            with zipfile.ZipFile(temporary) as bundle, atomic(path) as captions:
                captions.write_bytes(bundle.read(f"annotations/{path.name}"))
        except zipfile.BadZipFile as error:
            raise ValueError("what arrived is no whole zip archive") from error
        except KeyError as error:
            raise Stop(f"{base_url} has an archive, but no {path.name} is in it.") from error

    def progress(blocks, size, total):
        bar.total = max(total, blocks * size)
        bar.update(blocks * size - bar.n)

    try:
        with tqdm(desc=archive.name, unit="B", unit_scale=True, leave=False) as bar:
            fetch(f"{base_url}/annotations/{archive.name}", archive, take_out, progress)
    except OSError as error:
        raise Stop(f"COCO's captions could not be fetched from {error.strerror or error}. Name a COCO folder "
                   "(--coco) or a mirror (--mirror), or try the demo, which needs no network.") from error
    archive.unlink(missing_ok=True)


def fetch_photographs(photographs, folder, base_url):
    """Fetch every photograph that is not in `folder` yet, sixteen at a time."""

    def fetch_one(photograph):
        def check(temporary):
            with Image.open(temporary) as arrived:
                if arrived.size != photograph["size"]:
                    raise ValueError(f"its size is {arrived.size}, the annotations say {photograph['size']}")
                arrived.load()  # decodes every pixel: a truncated JPEG raises here

        name = photograph["file_name"]
        fetch(f"{base_url}/{folder.name}/{urllib.parse.quote(name)}", folder / name, check)

    failures, pool = [], ThreadPoolExecutor(16)
    try:
        jobs = [pool.submit(fetch_one, p) for p in photographs if not (folder / p["file_name"]).exists()]
        for job in tqdm(jobs, desc="photographs", disable=not jobs):
            if error := job.exception():
                failures.append(first_line(error))
            if getattr(error, "errno", None) in DISK_FULL:
                raise Stop("The disk is full. What arrived is kept; free some space and run this again.")
            if len(failures) > max(10, 0.05 * len(photographs)):
                raise Stop(f"Too many photographs could not be fetched (the last: {failures[-1]}). What "
                           "arrived is kept; run the same command again later.")
    finally:  # also on Ctrl-C: what has not started never does
        pool.shutdown(cancel_futures=True)
    for failure in failures:
        print(f"skipped: {failure}")


# %% Appendix C. The commands --------------------------------------------------------------------------
# What `python cvae.py prepare`, `train`, `sample`, `evaluate` and `demo` do with all this, and their options.

def prepare(args):
    """Fetch what is missing, crop, embed with CLIP, and write one data file for all trainings."""
    words = args.words or THEMES[args.theme or "bucolic"]
    must_be_writable(Path(args.data).parent, Path(args.data))
    device = choose_device(args.device)
    root, server = Path(args.coco or "data/coco"), args.mirror or COCO_URL
    captions_path = root / f"annotations/captions_{args.split}.json"
    if not args.coco:
        fetch_annotations(captions_path, server)
    photographs = read_captions(captions_path, words)
    folder = root / args.split
    model = load_clip(args.clip, device)  # before the long download: a mistake should show early
    if not args.coco:
        fetch_photographs(photographs, folder, server)
    on_disk = [p for p in photographs if (folder / p["file_name"]).exists()]
    print(f"{len(photographs)} photographs match {', '.join(words) or 'every word'}; {len(on_disk)} are in "
          f"{folder}, {len(photographs) - len(on_disk)} are missing.")
    kept, images, embeddings = embed_photographs(model, [folder / p["file_name"] for p in on_disk], device)
    kept = [on_disk[i] for i in kept]
    # a photograph with fewer than five captions repeats them, one with more keeps the first five
    captions = [[p["captions"][i % len(p["captions"])] for i in range(CAPTIONS)] for p in kept]
    texts = [caption for five in captions for caption in five]
    caption_embeddings = encode_texts(model, texts).cpu()                               # (5N, D)
    part = split_parts(images)
    fingerprint = hashlib.sha256(embeddings.numpy())  # reads the memory as it lies there, without a copy
    fingerprint.update(caption_embeddings.numpy())
    save({"images": images, "image_embeddings": embeddings, "captions": captions,
          "caption_embeddings": caption_embeddings.view(len(kept), CAPTIONS, -1), "part": part,
          "ids": [p["id"] for p in kept], "words": words, "clip": str(args.clip),
          "fingerprint": fingerprint.hexdigest(), "clip_fingerprint": clip_fingerprint(model)},
         args.data, "data file")
    sizes = part.bincount().tolist()
    print(f"{args.data}: {sizes[TRAINING]} photographs to learn from, {sizes[VALIDATION]} to choose by, "
          f"{sizes[TEST]} to judge by.")


def train(args):
    """Train the VAE, then the prior on its codes; write a run folder with checkpoints and pictures.

    The run's configuration is stored in its checkpoints, so --resume needs no other option.
    """
    device = choose_device(args.device)
    dtype = choose_precision(device, args.precision)
    run, config, checkpoint = open_run(args)
    data = load_data(config["data"], device, config.get("fingerprint"))
    config |= {"condition_dim": data["image_embeddings"].shape[-1]}
    config |= {name: data[name] for name in ("clip", "clip_fingerprint", "fingerprint")}
    images = to_device(pool_images(data["images"], config["size"]), device)             # uint8 (N, 3, S, S)
    run = run if checkpoint else claim_run(run, config)
    torch.manual_seed(config["seed"])
    vae = VAE(config["size"], config["condition_dim"], config["latents"], config["dropout"],
              config["channels"])
    vae.condition.learn_statistics(data, rows_of(data, TRAINING))
    vae = vae.to(device, memory_format=torch.channels_last)
    print(f"{run}: {len(rows_of(data, TRAINING))} photographs of {config['size']} pixels, on {device.type} "
          f"in {dtype}; the VAE has {sum(p.numel() for p in vae.parameters()):,} parameters")
    models = {"vae": vae, "prior": None}
    history = checkpoint["history"] if checkpoint else {"vae": [], "prior": []}
    saved = checkpoint and checkpoint["training"]  # what a resumed run was doing

    if saved and saved["part"] == "prior":
        best = checkpoint["vae"]
    else:
        part = vae_part(vae, images, data, config, device, dtype)
        fit(part, run, config, models, history, device, dtype, saved)
        best, saved = load(run / "best.pt", "checkpoint")["vae"], None  # of the best validation
    vae.load_state_dict(best)
    models["vae"] = vae.requires_grad_(False).eval()
    if config["prior"] == "flow":
        part = prior_part(vae, images, data, config, device, dtype, models)
        print(f"{run}: now the prior, {sum(p.numel() for p in part.network.parameters()):,} parameters")
        fit(part, run, config, models, history, device, dtype, saved)
        models["prior"].load_state_dict(load(run / "best.pt", "checkpoint")["prior"])
    save_prior_picture(run / "prior.png", models, images, data, device)


@torch.no_grad()
def sample(args):
    """Draw pictures for prompts (or from a photograph, or between two prompts); write a captioned grid."""
    device = choose_device(args.device)
    models, config = load_models(checkpoint_path(args.checkpoint), device)
    guidance, steps = flow_options(args, models)
    clip_model = load_clip_of(config, device, args.clip)
    wishes = read_wishes(args, clip_model, device)
    must_be_writable(Path(args.out))
    rows, count = [], max(args.n, args.rerank)

    def noise(count):  # anew for each row: a prompt's row does not depend on its neighbours
        torch.manual_seed(args.seed)
        return args.temperature * torch.randn(count, *models["vae"].shape, device=device)

    if args.interpolate:  # one row, in which only the condition changes
        (first, a, _), (second, b, _) = wishes
        wishes = [(f"{first} → {second}", slerp(a[0], b[0], args.n), CAPTION)]
    for _, target, kind in tqdm(wishes, desc="sampling", leave=False):                  # target: (1 or n, D)
        if args.show_steps:
            way = draw_codes(models["prior"], noise(1), target, kind, guidance, steps)
            shown = torch.linspace(0, steps, args.n).round().long().tolist()
            decoded = torch.cat([models["vae"].decode(way[step], target, kind) for step in shown])
            rows.append(sharpen(decoded, models["vae"].gain))
            continue
        start = noise(1).expand(count, -1, -1, -1) if args.interpolate else noise(count)
        pictures = generate(models, target.expand(count, -1), kind, start, guidance, steps)
        if args.rerank:
            scores = encode_images(clip_model, pictures) @ target[0]
            pictures = pictures[scores.topk(args.n).indices]
        rows.append(pictures)
    labels = [label for label, _, _ in wishes]
    path = sample_path(args.out, " ".join(labels))
    save_grid(path, rows, labels)
    print(path)
    if args.separate:
        from torchvision.utils import save_image
        for number, picture in enumerate(torch.cat(rows), 1):
            own_path = path.with_name(f"{path.stem}-{number:02}.png")
            with atomic(own_path) as temporary:
                save_image(picture, temporary)
            print(own_path)


@torch.no_grad()
def evaluate(args):
    """Measure a run on test photographs and captions; print a table.

    Writes evaluation.json, reconstructions.png and nearest.png into the run's folder.
    """
    device = choose_device(args.device)
    path = checkpoint_path(args.checkpoint)
    models, config = load_models(path, device)
    chosen_guidance, steps = flow_options(args, models)
    data = load_data(args.data or config["data"], device, config["fingerprint"])
    clip_model = load_clip_of(config, device, args.clip)
    images = pool_images(data["images"], config["size"])                                # uint8 (N, 3, S, S)
    test, folder = rows_of(data, TEST), path.parent
    storage = measure_vae(models["vae"], images, data, test, device)
    guidances = sorted({1.0, chosen_guidance}) if models["prior"] else [1.0]
    table, pictures, distance, copied = measure_samples(models, images, data, clip_model, guidances, steps,
                                                        args.seed, device)
    print(f"{path}, {len(test)} test photographs: {storage['bpd']:.3f} bits/dim, KL {storage['kl']:.0f} nats,"
          f" PSNR {storage['psnr']:.1f} dB")
    print(" " * 24 + "".join(f"{column:>13}" for column in table["photographs"]))
    for name, row in table.items():
        print(f"{name:24}" + "".join(f"{value:13.3f}" for value in row.values()))
    with atomic(folder / "evaluation.json") as temporary:
        temporary.write_text(json.dumps({"checkpoint": str(path), **storage, "table": table}, indent=2))
    save_reconstructions(folder / "reconstructions.png", models["vae"], images, data, test[:8], device)
    suspects = distance.argsort()[:8]
    save_grid(folder / "nearest.png", [pictures[suspects], take(images, copied[suspects], device)],
              ["the eight samples that are nearest to a training picture", "and those training pictures"])
    print(f"Also in {folder}: evaluation.json, reconstructions.png, nearest.png")


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

    def type_in(line):
        print(f"\n$ python cvae.py {line}")
        step = parse_arguments(shlex.split(line))
        step.function(step)

    train = (f"train --data data/toy.pt --epochs {args.epochs} --prior-epochs {args.prior_epochs} "
             "--prior-width 128 --no-flip --no-detour")  # captions say left and right; a night has one moon
    type_in(f"prepare --coco {root} --split toy --words sheep cow horse --clip {root}/clip.pt "
            "--data data/toy.pt")
    type_in(f"{train} --channels 8")
    grid = checkpoint_path(None).parent
    type_in(f"sample -n 4 {shlex.join(DEMO_PROMPTS)}")
    type_in("evaluate")
    if args.compare:
        type_in(f"{train} --latents flat")
        runs = {"flat": checkpoint_path(None).parent, "grid": grid}
        save_comparison(grid / "comparison.png", runs, DEMO_PROMPTS, choose_device())
        print(f"{grid}/comparison.png")


# Options -------------------------------------------------------------------------------------------

def between(kind, low, high):
    """An argparse type: a number of the given kind from low to high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # also refuses nan
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = "number"  # argparse says "invalid number value: 'x'"
    return parse


def plain_name(text):
    """An argparse type: a name that is no path."""
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a plain name")
    return text


SEED, ON_OFF = between(int, 0, 2**31 - 1), argparse.BooleanOptionalAction
EPOCHS, RATE = {"type": between(int, 1, 100_000)}, {"type": between(float, 1e-7, 1)}
SETTINGS = {  # of a training: the default, what --help says, and how argparse reads it
    "data": (DATA, "data file to read", {"metavar": "FILE"}),
    "size": (64, "pixels", {"type": int, "choices": [64, 128]}),
    "latents": ("grid", "a grid of codes, or one vector as in the report", {"choices": ["grid", "flat"]}),
    "channels": (CHANNELS, "numbers in each cell of the grid", {"type": between(int, 1, 64)}),
    "prior": ("flow", "learn p(z | c), or draw from N(0, I) as the report", {"choices": ["flow", "normal"]}),
    "objective": ("elbo", "the ELBO, or the report's loss", {"choices": OBJECTIVES}),
    "dropout": (0.0, "dropout on z; 0.3 if no P is given",
                {"nargs": "?", "type": between(float, 0, 0.9), "const": 0.3, "metavar": "P"}),
    "epochs": (30, "of the VAE", EPOCHS),
    "prior_epochs": (100, "of the prior", EPOCHS),
    "prior_width": (192, "of its transformer", {"type": int, "choices": [64, 128, 192, 256, 384, 512]}),
    "batch": (16, "pictures per step of the VAE; the prior takes four times as many",
              {"type": between(int, 1, 4096)}),
    "lr": (3e-3, "peak learning rate of the VAE", RATE),
    "prior_lr": (1.5e-3, "peak learning rate of the prior", RATE),
    "seed": (0, "of all randomness", {"type": SEED}),
    "flip": (True, "mirror half of the pictures; off where captions say left and right", {"action": ON_OFF}),
    "detour": (True, "half of the tokens skip the prior's middle layers in training: faster; off where "
               "details must be exact, as the number of moons", {"action": ON_OFF}),
    "compile": (None, "torch.compile (default: on CUDA). On a processor it needs a C++ compiler and a "
                "minute, and makes the prior an eighth faster", {"action": ON_OFF})}
DEFAULTS = {name: default for name, (default, _, _) in SETTINGS.items()}
CHANGEABLE = "data", "epochs", "prior_epochs", "lr", "prior_lr", "compile"  # in a run that is resumed


def add_drawing_options(p):
    """What sample and evaluate have in common."""
    p.add_argument("--seed", type=SEED, default=0, help="same seed, same pictures (default: 0)")
    p.add_argument("--guidance", type=between(float, 0, 20),
                   help=f"more than 1: surer, less varied (default: {GUIDANCE:g}; evaluate also measures 1)")
    p.add_argument("--steps", type=between(int, 1, 1000), help=f"of the flow (default: {STEPS})")
    p.add_argument("--checkpoint", metavar="FILE", help="checkpoint or run folder (default: the newest run)")
    p.add_argument("--clip", help="the run's CLIP, if its file has moved")


def parse_arguments(argv=None):
    """The command line as a namespace. Of train's settings those that are not given are None."""
    parser = argparse.ArgumentParser(description="Text to picture: a CLIP-conditioned VAE, a learned prior.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an expected error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(function, help):
        made = commands.add_parser(function.__name__, help=help, description=help)
        made.set_defaults(function=function)
        made.add_argument("--device", choices=["cuda", "mps", "cpu"], help="default: the fastest there is")
        return made

    p = command(prepare, "fetch COCO's matching photographs, crop and embed them: one data file")
    p.add_argument("--theme", choices=THEMES, help="word list that captions must match (default: bucolic)")
    p.add_argument("--words", nargs="+", metavar="WORD", help="a word list of your own")
    p.add_argument("--split", default="train2017", type=plain_name, help="part of COCO (default: train2017)")
    p.add_argument("--coco", metavar="DIR", help="a COCO folder on disk; nothing is fetched")
    p.add_argument("--mirror", metavar="URL", help=f"address to fetch from (default: {COCO_URL})")
    p.add_argument("--clip", default="ViT-B/32", help="CLIP's name, or a weights file (default: ViT-B/32)")
    p.add_argument("--data", default=DATA, help=f"data file to write (default: {DATA})")

    p = command(train, "train the VAE, then its prior, on the data file")
    for name, (default, help, details) in SETTINGS.items():
        help = help if default is None else f"{help} (default: {default})"
        p.add_argument(f"--{name.replace('_', '-')}", help=help, **details)
    p.add_argument("--precision", choices=["float32", "bfloat16", "float16"], help="default: the fastest")
    p.add_argument("--run", metavar="DIR", help="run folder (default: a new one in runs/)")
    p.add_argument("--resume", action="store_true",
                   help="go on with --run (default: the newest); more --epochs or --prior-epochs make it "
                   "longer: the learning rate returns to its plateau and descends at the new end")

    p = command(sample, "draw pictures for prompts")
    p.add_argument("prompts", nargs="*", metavar="PROMPT")
    p.add_argument("-n", type=between(int, 1, 64), default=8, help="pictures per prompt (default: 8)")
    add_drawing_options(p)
    p.add_argument("--temperature", type=between(float, 0, 2), default=1.0, help="of the noise (default: 1)")
    p.add_argument("--rerank", type=between(int, 1, 4096), default=0, metavar="N",
                   help="draw N per prompt and keep those that CLIP likes best")
    p.add_argument("--image", metavar="FILE", help="draw variations of a photograph")
    p.add_argument("--interpolate", action="store_true", help="go from the first prompt to the second")
    p.add_argument("--show-steps", action="store_true", help="one row per prompt: from noise to a picture")
    p.add_argument("--separate", action="store_true", help="also write each picture as a PNG of its own")
    p.add_argument("--out", default="samples", metavar="DIR", help="folder to write to (default: samples)")

    p = command(evaluate, "measure a run on the test part of its data")
    add_drawing_options(p)
    p.add_argument("--data", help="the run's data file, if it has moved")

    p = command(demo, "a toy world from drawing to sampling: no download, no GPU, a few minutes")
    p.add_argument("--epochs", default=4, help="of the VAE; fewer: quicker, worse (default: 4)", **EPOCHS)
    p.add_argument("--prior-epochs", default=30, help="of the prior (default: 30)", **EPOCHS)
    p.add_argument("--compare", action="store_true", help="also train a flat code; draw all four ways")
    return parser.parse_args(argv)


def refuse_contradictions(args):
    """Options that make no sense together are refused, rather than one of them ignored."""
    given = {name for name, value in vars(args).items() if value}  # neither None nor zero, False, empty
    if {"theme", "words"} <= given or {"coco", "mirror"} <= given:
        raise Stop("Give --theme or --words, not both; --coco (nothing is fetched) or --mirror, not both.")
    if args.function is sample:
        if not given & {"prompts", "image"}:
            raise Stop('Say what to draw: python cvae.py sample "sheep on a hill", or --image FILE.')
        if args.interpolate and (len(args.prompts) != 2 or given & {"image", "show_steps"}):
            raise Stop("--interpolate goes between exactly two prompts, without --image or --show-steps.")
        if args.rerank and (given & {"interpolate", "show_steps"} or args.rerank < args.n):
            raise Stop("--rerank N draws N pictures and keeps the best -n of them: N must be at least as "
                       "large, and it doesn't go with --interpolate or --show-steps.")
    if args.function is train and args.latents == "flat" and args.channels:
        raise Stop("--channels is for a grid of codes, and --latents flat has none.")
    if args.function is train and not args.resume and args.prior == "normal":
        for name in given & {"prior_epochs", "prior_lr", "prior_width"}:
            raise Stop(f"--{name.replace('_', '-')} says how to train a flow, and --prior normal wants none.")


def main(argv=None):
    """Run one command; an expected failure becomes one sentence and exit status 1."""
    args = parse_arguments(argv)
    socket.setdefaulttimeout(TIMEOUT)  # for every download, clip's own among them
    try:
        refuse_contradictions(args)
        args.function(args)
    except (Stop, KeyboardInterrupt, OSError, torch.OutOfMemoryError) as error:
        if args.debug:
            raise
        message = str(error)
        if isinstance(error, torch.OutOfMemoryError):
            message = "The GPU ran out of memory; try a smaller -n."
            if args.function is train:
                half = max(1, (args.batch or DEFAULTS["batch"]) // 2)
                message = f"The GPU ran out of memory; try --batch {half}."
        elif isinstance(error, KeyboardInterrupt):
            message = message or "Interrupted. What was finished is kept; the same command goes on."
        sys.exit(f"\n{message}")


if __name__ == "__main__" and "ipykernel" not in sys.modules:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()  # in a notebook, call it yourself: main(["sample", "sheep on a hill"])
