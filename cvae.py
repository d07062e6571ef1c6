"""Text to picture in one file: a variational autoencoder (VAE), conditioned on CLIP, with a learned prior.

Training has three stages. The VAE learns a small latent z for every photograph x:

    x ─► encoder ─► mu, sigma ─► z = mu + sigma · noise ─► decoder ─► x_hat, a reconstruction of x
            ▲                                                 ▲
            └────────── condition c: what CLIP says ──────────┘
                           about x or its caption

The decoder learns on, with a critic that looks for what photographs have and reconstructions lack:

    x or x_hat ─► critic ─► real or decoded?

The prior learns which latents go with which condition, and sampling puts all together:

    prompt ─► CLIP's text encoder ─► c      noise ─► prior, told c ─► z      z, c ─► decoder ─► picture

The quickest tour needs neither a download nor a GPU: python cvae.py demo. The real thing, on the photographs of
MS-COCO that show cows and sheep:

    python cvae.py prepare                            # fetch, crop, embed: one data file
    python cvae.py train --size 128 --dropout         # a run folder; without a card plain `train`, of 64 pixels
    python cvae.py sample "sheep on a hill"           # a captioned row of pictures
    python cvae.py evaluate                           # how good it is, in numbers and pictures

Contents (each `# %%` is a notebook cell in VS Code, Spyder and Jupyter)

    0. The method          all of it in thirty lines
    1. The data            which COCO photographs are bucolic
    2. CLIP                two encoders, one space
    3. The VAE             encoder, reparameterisation, decoder; where the condition enters and why twice
    4. The ELBO            derived line by line; the calibrated likelihood; the report's loss
    5. Training            one loop for three stages
    6. The second lesson   why a mean is blurred; a critic
    7. The prior           why N(0, I) will not do; flow matching; guidance
    8. Sampling            from text, from an image, in between
    9. Evaluation          on pictures that nothing was chosen on
    Appendices             A. a toy world   B. devices, files, downloads   C. the command line

What the sections call from the appendices does what its name says. `UserError` is an expected failure: its
sentence is all that the user sees. `# Try it` stands before something to type after the demo, in a shell after
`source .venv/bin/activate`: a command, or lines for Python (`from cvae import *`) or a notebook. Three papers to read
first are marked [1] to [3].

It reimplements "the report": Azarbal, Benjelloun Touimi, Tazi, "Generative CLIP-Conditioned Variational
Autoencoders" (Brown University, 2024).
"""
import argparse
import contextlib
import difflib
import errno
import hashlib
import http.client
import io
import json
import math
import os
import random
import re
import shlex
import signal
import socket
import sys
import tempfile
import time
import unicodedata
import urllib.parse
import urllib.request
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from tqdm import tqdm

# clip, torchvision, pycocotools and matplotlib are slow to import, so each is imported where it is used. These
# warnings ask nothing of a reader: clip uses what is deprecated, and matplotlib has no glyph for an emoji.
for message in "pkg_resources is deprecated", "`torch.jit.load` is deprecated", "Glyph":
    warnings.filterwarnings("ignore", message)

# %% 0. The method ----------------------------------------------------------------------------------
# All of it, with the shapes of one picture of 64 pixels. Each line returns as code, with its details, further down.
# `noise` is a draw from the normal distribution N(0, I), a new one each time; KL measures how far q is from N(0, I).
#
#     Stage 1: the VAE                                    # sections 3 to 5
#         mu, logvar = encode(x, c)                       # 3x64x64 -> 12x8x8 each
#         z = mu + exp(logvar / 2) * noise                # 12x8x8, a draw from q(z | x, c)
#         x_hat = decode(z, c)                            # 12x8x8 -> 3x64x64
#         loss = D / 2 * log(MSE(x_hat, x)) + KL(q, N(0, I))
#
#     Stage 2: the decoder's second lesson                # section 6; the encoder is frozen
#         loss = mean((x - x_hat)² / (2 * variance)) - 0.3 * critic(x_hat)    # critic: 3x56x56 -> 1x7x7
#         critic's loss = max(0, 1 - critic(x)) + max(0, 1 + critic(x_hat))
#
#     Stage 3: the prior                                  # section 7; every mu and sigma is computed once
#         z_t = (1 - t) * z + t * noise                   # 12x8x8, seen as 16 tokens of 2x2x12 numbers
#         loss = MSE(flow(z_t, t, c), noise - z)          # flow predicts the velocity: 12x8x8
#
#     Sampling "sheep on a hill"                          # section 8
#         c = CLIP's text encoder("sheep on a hill")      # 512 numbers
#         z = noise
#         for t in 16/16, 15/16, ..., 1/16:
#             z = z - flow(z, t, c) / 16                  # a step against the velocity, towards a latent
#         picture = decode(z, c)                          # 12x8x8 -> 3x64x64
#
# Letters, in shapes and comments:
#     x, x_hat     a picture, a reconstruction     (N, 3, S, S)    N pictures, each of D = 3 · S · S values in [0, 1]
#     z            a latent: all its numbers       (N, C, G, G)    G = S / 8 cells a side, C = 12 channels
#     mu, logvar   of q(z | x, c)                  (N, C, G, G)    sigma = exp(logvar / 2)
#     c            condition: a CLIP embedding     (N, E)          E = 512 for ViT-B/32
#     modality     whose embedding c is            (N,)            IMAGE, TEXT or NULL (none)
#     t            time of the flow                (N,)            0: a latent, 1: noise
#     W, T         transformer: width, tokens      (N, T, W)       T = (G / 2)² patches of 2x2 cells

# %% 1. The data ------------------------------------------------------------------------------------
# MS-COCO (Lin et al. 2014, arXiv 1405.0312) has 118,287 training photographs with five captions each. We take the
# rural ("bucolic") ones, a subject narrow enough for a small model: those with a theme's word in one caption or more.

THEMES = {
    "bucolic": ["cow", "sheep"],
    "nature": ["cow", "sheep", "mountain", "hill", "countryside", "grass", "forest", "nature", "farm",
               "alpaca", "horse", "landscape", "fence"],
    "all": [""]}  # the empty word is in every caption
SIZE = 128           # pixels in the data file; a model of 64 pixels averages them down
CAPTIONS = 5         # captions kept per photograph, COCO's usual number
TRAIN, VAL, TEST = 0, 1, 2  # splits: one teaches, one chooses checkpoints and settings, one is for `evaluate` alone


def word_pattern(words):
    """A regular expression that finds `words` in captions, also with an ending (cows, hillside), but no cowboys."""
    stems = "|".join(re.escape(word) for word in words)
    endings = "s|es|y|ed|ous|lands?|sides?|tops?|yards?|house|back"
    return re.compile(rf"(?<!\w)(?:{stems})(?:{endings})?(?!\w)" if any(words) else "", re.IGNORECASE)


def centre_square(photograph, size):
    """The largest centred square of a PIL image, resized: uint8 (3, size, size). CLIP and the VAE see the same."""
    from torchvision.transforms.v2 import InterpolationMode, functional
    pixels = functional.pil_to_tensor(photograph)                                       # (3, height, width)
    square = functional.center_crop(pixels, [min(photograph.size)] * 2)
    return functional.resize(square, [size, size], InterpolationMode.BICUBIC, antialias=True)


def split_data(images):
    """Assign photographs to splits by a hash of their pixels, so that equal ones stay together: (N, ...) -> (N,)."""
    hashes = [int(hashlib.sha256(image.numpy().tobytes()).hexdigest()[:15], 16) for image in images]
    different, rank = torch.tensor(hashes).unique(return_inverse=True)  # rank among the sorted hashes
    if len(different) < 4:
        raise UserError("Too few different photographs: at least four are needed, two of them to learn from.")
    test = max(1, min(1000, len(different) // 10))
    val = max(1, min(500, len(different) // 20))
    split = torch.full_like(rank, TRAIN)
    split[rank < test + val] = VAL
    split[rank < test] = TEST
    return split


# Try it: which captions does a word find?
#     found = read_captions("data/toy/annotations/captions_toy.json", ["stars"])
#     print(len(found), *found[0]["captions"], sep="\n")

# %% 2. CLIP ----------------------------------------------------------------------------------------
# CLIP (Radford et al. 2021, arXiv 2103.00020) is an image encoder and a text encoder, trained together: the vectors of
# a picture and its caption have a higher cosine than those of a mismatch. Only the directions of these vectors,
# called embeddings, count, so each is scaled to length one. It has E numbers: 512 for ViT-B/32, the CLIP we use.
# `prepare` (appendix C) embeds all pictures and captions once, into one data file.

CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
CPU = torch.device("cpu")  # there CLIP computes in bfloat16 if that is fast; on CUDA its weights are float16


@torch.no_grad()
def encode_images(model, images):
    """Embed pictures with CLIP: uint8 or [0, 1] float (N, 3, H, H) -> unit vectors (N, E)."""
    resolution, embeddings = model.visual.input_resolution, []
    for batch in images.split(64):
        pixels = batch.float() / 255 if batch.dtype == torch.uint8 else batch
        if pixels.shape[-1] != resolution:
            pixels = F.interpolate(pixels, (resolution,) * 2, mode="bicubic", antialias=True).clamp(0, 1)
        # CLIP was trained on pixels normalised like this; the report fed it raw [0, 1] values
        pixels = (pixels - CLIP_MEAN.to(pixels.device)) / CLIP_STD.to(pixels.device)
        with autocast(CPU, choose_precision(CPU)):
            embeddings.append(F.normalize(model.encode_image(pixels).float(), dim=-1))
    return torch.cat(embeddings)


@torch.no_grad()
def encode_texts(model, texts):
    """Embed N captions with CLIP, which reads at most 77 tokens (about 55 words) of each: unit vectors (N, E)."""
    import clip
    device, embeddings = model.text_projection.device, []
    order = torch.tensor([len(text) for text in texts]).argsort()  # a batch of texts alike in length: few empty tokens
    for batch in tqdm(order.split(64), "CLIP, captions", leave=False, disable=len(texts) <= 512):
        tokens = clip.tokenize([texts[number] for number in batch], model.context_length, truncate=True)  # (n, 77)
        # no token sees later ones, and CLIP reads a text off its end token, the largest number: cut what follows
        tokens = tokens[:, :int(tokens.argmax(1).max()) + 1]
        with autocast(CPU, choose_precision(CPU)):
            embeddings.append(F.normalize(model.encode_text(tokens.to(device)).float(), dim=-1))
    return torch.cat(embeddings)[order.argsort().to(device)]  # as they came


# The modality gap. CLIP only asks pairs to be nearer than mismatches, and images and captions end up in two separate
# narrow cones (Liang et al. 2022, arXiv 2203.02053). The report trained on image embeddings and prompted with text
# embeddings, which its decoder had never seen. Here a training picture comes with its own embedding or, at random,
# with that of one of its captions, and encoder, decoder and prior are told which: the modality.

IMAGE, TEXT, NULL = 0, 1, 2  # modality of a condition; NULL: no condition, which guidance needs (section 8)


class Condition(nn.Module):
    """Embeddings (N, E) and their modality (one number, or (N,)) as the networks take them: (N, width)."""

    def __init__(self, dimensions, width):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2, dimensions))
        self.register_buffer("std", torch.ones(2, dimensions))
        self.project = nn.Linear(dimensions, width)
        self.modality = nn.Embedding(3, width)
        nn.init.zeros_(self.modality.weight)  # at first all modalities look alike

    def learn_statistics(self, data, index):
        """Mean and deviation of each modality's embeddings; `forward` standardises them."""
        for modality, embeddings in ((IMAGE, data["image_embeddings"][index]),
                                     (TEXT, data["caption_embeddings"][index].flatten(0, 1))):
            self.mean[modality], self.std[modality] = embeddings.mean(0), embeddings.std(0) + 1e-6

    def forward(self, embedding, modality):
        modality = torch.as_tensor(modality, device=embedding.device).expand(len(embedding))
        own = modality.clamp(max=TEXT)  # NULL has no mean; it borrows a caption's, and the result is not used
        projected = self.project((embedding - self.mean[own]) / self.std[own])          # (N, width)
        return torch.where(modality[:, None] == NULL, 0.0, projected) + self.modality(modality)


def sample_condition(data, index):
    """Embeddings (n, E) and modalities (n,) for photographs (n,): seven of ten a caption's, as prompts will be."""
    modality = torch.where(torch.rand(len(index), device=index.device) < 0.7, TEXT, IMAGE)
    which = torch.randint(CAPTIONS, (len(index),), device=index.device)  # another caption at every visit
    captions, images = data["caption_embeddings"][index, which], data["image_embeddings"][index]
    return torch.where(modality[:, None] == TEXT, captions, images), modality


# Try it: which of three captions is nearest to a prompt?
#     model, captions = load_clip("data/toy/clip.pt"), ["a sheep under the stars", "a sheep on a sunny day", "two cows"]
#     print(encode_texts(model, ["a sheep at night"]) @ encode_texts(model, captions).T)

# %% 3. The VAE -------------------------------------------------------------------------------------
# A VAE (Kingma & Welling 2013, arXiv 1312.6114) [1] has two halves. The encoder q(z | x, c) maps a picture x to a
# distribution of latents z, the Gaussian N(mu, sigma²). The decoder maps a draw z to x_hat, the mean of a Gaussian
# p(x | z, c), the likelihood. The loss (section 4) is minus its log at x, plus the KL, the price of q's information.
#
# Both take the condition c: the decoder, because in sampling c is the prompt; the encoder, to know what z need not say.
# The report draws z from N(0, I), so there only c carries the prompt. Ours draws z from a prior that knows the prompt
# (section 7), so z may say everything, and does: the decoder hardly uses c (swap c and see, below).
#
# The report's z is one vector of 128 numbers ("flat"). Ours is a grid, as in latent diffusion (Rombach et al. 2022,
# arXiv 2112.10752) [2]: 12 numbers for each square of 8x8 pixels, so the decoder need not learn where things are.
#
# A convolution at 64x64 does 64 times the work of one at 8x8, so most layers work on small maps; the decoder's last
# hide the borders between the squares that its cells wrote. Beside both halves runs a linear skip connection: weighted
# sums of each 8x8 square go to its cell, and back. One linear layer learns these sooner than many layers.

LATENT_DIM = 128          # numbers in the flat latent, the report's
CONDITION_CHANNELS = 32   # the condition's share of the channels, the report's


class ResBlock(nn.Module):
    """Two 3x3 convolutions correct their input (He et al. 2015, arXiv 1512.03385): shape in = shape out."""

    def __init__(self, width):
        super().__init__()
        self.change = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
                                    nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        nn.init.zeros_(self.change[-1].weight)  # a new block only adds its bias

    def forward(self, h):
        return h + self.change(h)


def upsample(channels_in, channels, factor, kernel=1):
    """Each cell becomes a square of factor x factor cells (sub-pixel convolution, arXiv 1609.05158)."""
    return nn.Sequential(nn.Conv2d(channels_in, factor**2 * channels, kernel, padding=kernel // 2),
                         nn.PixelShuffle(factor))


class VAE(nn.Module):
    """Encoder and decoder. size: pixels S; condition_dim: E; width: channels at S / 2 (32 in the comments).

    The latent z is (N, C, G, G): C = channels and G = S / 8 if latents is "grid", C = 128 and G = 1 if "flat".
    dropout on z, the report's, makes the decoder rely more on c.
    """

    def __init__(self, size, condition_dim, latents="grid", dropout=0.0, channels=12, width=32):
        super().__init__()
        half, quarter, eighth = width, 2 * width, 3 * width
        channels, side, k = (channels, size // 8, 1) if latents == "grid" else (LATENT_DIM, 1, size // 8)
        self.shape = (channels, side, side)  # and each cell of it sees k x k cells of the map of S / 8
        self.condition = Condition(condition_dim, CONDITION_CHANNELS)
        self.encoder = nn.Sequential(
            nn.Conv2d(3, quarter, 4, stride=4), ResBlock(quarter),                      # (N, 64, S/4, S/4)
            nn.Conv2d(quarter, eighth, 3, stride=2, padding=1),                         # (N, 96, S/8, S/8)
            ResBlock(eighth), ResBlock(eighth), nn.GroupNorm(8, eighth), nn.SiLU())
        self.to_moments = nn.Conv2d(eighth + CONDITION_CHANNELS, 2 * channels, k)       # (N, 2C, G, G)
        self.from_latent = nn.ConvTranspose2d(channels + CONDITION_CHANNELS, eighth, k)  # (N, 96, S/8, S/8)
        self.skip_in = nn.Conv2d(3, 2 * channels, 8 * k, stride=8 * k)                  # (N, 2C, G, G)
        self.skip_out = nn.ConvTranspose2d(channels, 3, 8 * k, stride=8 * k)            # (N, 3, S, S)
        nn.init.zeros_(self.skip_in.weight[channels:])  # no skip connection to logvar at first
        self.dropout = nn.Dropout(dropout)
        self.decoder = nn.Sequential(
            ResBlock(eighth), ResBlock(eighth),                                         # (N, 96, S/8, S/8)
            upsample(eighth, half, 4), ResBlock(half), nn.GroupNorm(8, half), nn.SiLU(),  # (N, 32, S/2, S/2)
            upsample(half, 3, 2, kernel=3))                                             # (N, 3, S, S)
        self.register_buffer("variance", torch.tensor(1.0))  # of the likelihood, see section 4

    def concat_condition(self, h, embedding, modality):
        """Concatenate the condition to a map, the same in every cell: (N, K, H, H) -> (N, K + 32, H, H)."""
        condition = self.condition(embedding, modality)[:, :, None, None]               # (N, 32, 1, 1)
        return torch.cat([h, condition.expand(-1, -1, *h.shape[2:])], dim=1)

    def encode(self, x, embedding, modality):
        """q(z | x, c): pictures (N, 3, S, S) in [0, 1] -> mu and logvar, (N, C, G, G) each."""
        x = x * 2 - 1  # layers learn best from inputs around zero
        h = self.encoder(x)                                                             # (N, 96, S/8, S/8)
        h = self.to_moments(self.concat_condition(h, embedding, modality)) + self.skip_in(x)  # (N, 2C, G, G)
        mu, logvar = h.float().chunk(2, dim=1)
        return mu, logvar.clamp(-10, 4)  # exp(logvar) stays finite

    def decode(self, z, embedding, modality):
        """The mean of p(x | z, c): latents (N, C, G, G) -> pictures (N, 3, S, S) in [0, 1]."""
        z = self.dropout(z)
        h = self.from_latent(self.concat_condition(z, embedding, modality))
        return torch.sigmoid((self.decoder(h) + self.skip_out(z)).float())

    def forward(self, x, embedding, modality):
        """Reconstruct x from a draw from q: x_hat (N, 3, S, S) and KL (N,) in nats."""
        mu, logvar = self.encode(x, embedding, modality)
        return self.decode(sample_posterior(mu, logvar), embedding, modality), kl_divergence(mu, logvar)


def sample_posterior(mu, logvar):
    """Draw z from q, reparameterised: the noise does not depend on weights, so gradients reach mu and sigma."""
    return mu + torch.exp(logvar / 2) * torch.randn_like(mu)


# Try it: eight photographs, reconstructed with their own conditions and with each other's: almost the same. Then a cell
# of the latents is zero: what was in its square of 8x8 pixels is gone, and little else.
#     models, data, x, c = open_newest_run()
#     x_hat, swapped = models["vae"](x, c, IMAGE)[0], models["vae"](x, c.flip(0), IMAGE)[0]
#     save_grid("samples/swapped.png", [x, x_hat, swapped], ["photographs", "x_hat", "x_hat, conditions swapped"])
#     z = models["vae"].encode(x, c, IMAGE)[0]
#     z[:, :, 4, 4] = 0
#     save_grid("samples/zeroed.png", [models["vae"].decode(z, c, IMAGE)], ["one cell of the latent is zero"])

# %% 4. The ELBO ------------------------------------------------------------------------------------
# We want parameters under which the photographs are likely: a high log p(x | c). E_q is the mean over draws z from q,
# and KL(q || p) = E_q [ log q - log p ]. Four lines lead to a loss, minus the evidence lower bound (ELBO), in nats:
#
#     log p(x | c) = log ∫ p(x | z, c) p(z) dz                            by definition
#                  = log E_q [ p(x | z, c) p(z) / q(z | x, c) ]           multiply and divide by q
#                 >= E_q [ log ( p(x | z, c) p(z) / q(z | x, c) ) ]       Jensen: log of a mean >= mean of logs
#                  = E_q [ log p(x | z, c) ] - KL( q(z | x, c) || p(z) )  =  ELBO
#
# The integral can't be computed; of the last line one draw z estimates the first term, and the second has a formula.
# They ask for good reconstructions and for a q near p(z) = N(0, I): the KL charges for each nat (1.44 bits) that z says
# of x. Without it the encoder would store every detail of x, and leave the prior (stage 3) a harder task.
#
# The likelihood p(x | z, c) is a Gaussian around x_hat with one variance for all D values. Chosen by hand, it would
# weigh the two terms. The best one is the MSE (sigma-VAE, arXiv 2006.13202):
#
#     -log p(x | z, c) = D/2 log(2 pi variance) + |x - x_hat|² / (2 variance)
#                      = D/2 log(MSE) + a constant          at  variance = MSE = |x - x_hat|² / D
#
# So with each batch's MSE as the variance (a constant to autograd) gradients are those of D/2 log(MSE) + KL: half the
# squared error is worth D/2 log 2 nats of KL. `train` prints (KL - log p(x | z, c)) / (D log 2) + 8, in bits per
# dimension. Usual at 64 pixels: 5 to 6.5 bits, 500 to 2,300 nats of KL, a PSNR (-10 log10 MSE) of 22 to 32 dB.

QUANTISATION = 1 / (12 * 256**2)  # a floor of the MSE: the variance of an error spread evenly over one of 256 levels


def kl_divergence(mu, logvar):
    """KL( N(mu, sigma²) || N(0, I) ) = ½ Σ [ sigma² + mu² - 1 - log sigma² ] in nats, of (N, C, G, G): (N,)."""
    return 0.5 * (logvar.exp() + mu**2 - 1 - logvar).flatten(1).sum(1)


def elbo_loss(x_hat, x, kl, variance, kl_weight=1.0):
    """Minus the ELBO, in bits per dimension, a mean over the pictures; variance: the likelihood's."""
    dimensions, mse = x[0].numel(), F.mse_loss(x_hat, x) + QUANTISATION
    nll = dimensions / 2 * (torch.log(2 * math.pi * variance) + mse / variance)  # -log p(x | z, c), in nats
    return (nll + kl_weight * kl.mean()) / (dimensions * math.log(2)) + 8        # 8: values in [0, 1] are 256 levels


def original_loss(x_hat, x, kl, variance=None, kl_weight=1.0):
    """The report's loss, which has no variance: BCE summed over pixels, averaged over channels, + KL and SSIM."""
    # BCE on values between 0 and 1 acts like a Gaussian of a large variance: few details are worth their KL, all blurs
    bce = F.binary_cross_entropy(x_hat, x, reduction="none").sum((1, 2, 3)) / 3
    return (bce + 0.5 * kl_weight * kl + 0.1 * (1 - ssim(x_hat, x)) / len(x)).mean()


OBJECTIVES = {"elbo": elbo_loss, "original": original_loss}

# Try it: where are the nats? Cells with an animal's edge take more of the KL than cells of plain sky.
#     models, data, x, c = open_newest_run()
#     mu, logvar = models["vae"].encode(x, c, IMAGE)
#     print((0.5 * (logvar.exp() + mu**2 - 1 - logvar)).sum(1)[0].round())            # (G, G), of the first picture

# %% 5. Training ------------------------------------------------------------------------------------
# Three stages, one loop. The pictures are bytes on the device (20,000 at 128 pixels are 1 GB), and a batch is an index.
# All randomness of step n comes from (seed, n): a run resumes from the weights, the state of the optimiser, and n.

CONFIG = {  # every setting of a run: each is an option of `train`, and checkpoints carry them all
    "data": "data/data.pt", "size": 64, "latents": "grid", "channels": 12, "prior": "flow", "objective": "elbo",
    "dropout": 0.0, "flip": True, "compile": True, "seed": 0,
    "vae_width": 32, "epochs": 20, "batch": 8, "lr": 3e-3,                              # stage 1: the VAE
    "decoder_epochs": 6, "decoder_batch": 32, "decoder_lr": 5e-4,                       # stage 2: its decoder
    "prior_width": 192, "prior_depth": 6, "prior_epochs": 100, "prior_batch": 64, "prior_lr": 1.5e-3}  # stage 3
MODELS = {  # what --model changes: "small" suits two processor cores and a Mac, "base" a CUDA card
    "small": {},
    "base": {"vae_width": 64, "epochs": 30, "batch": 64, "decoder_batch": 64, "prior_width": 512, "prior_depth": 8,
             "prior_epochs": 200, "prior_batch": 256, "prior_lr": 1e-3}}
WARM_UP = 50        # steps over which the learning rate rises
SAVE_SECONDS = 240  # between two writings of last.pt: about what kill -9 or a power cut costs at most


@dataclass
class Run:
    """The state of a training, which every stage is called with."""
    folder: Path
    config: dict
    data: dict                    # of load_data: embeddings, captions, splits
    images: torch.Tensor          # uint8 (N, 3, S, S)
    device: torch.device
    dtype: torch.dtype            # of matrix products and convolutions under autocast
    models: dict                  # {"vae", "prior"}: the networks that sample
    history: dict                 # {stage: [figures of step 0, then of each validation]}
    resumed: dict | None = None   # what last.pt says of the stage in which a resumed run was stopped


def learning_rate(step, total, peak):
    """Linear warm-up, a plateau, and a linear descent to zero over the second half of the steps."""
    return peak * min(1, (step + 1) / WARM_UP, (total - step) / (0.5 * total))


def take_step(networks, optimizer, scaler, loss, rate):
    """One step of the optimizer against the gradient of the loss, at this learning rate."""
    scaler.scale(loss).backward()   # the scaler does nothing unless we compute in float16
    average_gradients(networks)     # over all processes; a single one keeps its own
    scaler.unscale_(optimizer)
    for network in networks.values():
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)  # one odd batch can't move the weights far
    for group in optimizer.param_groups:
        group["lr"] = rate
    scaler.step(optimizer)          # does nothing where a float16 gradient overflowed
    scaler.update()
    optimizer.zero_grad()


@torch.no_grad()
def update_ema(ema, network, step):
    """Move an exponential moving average (EMA) towards the weights: it is less noisy (Polyak & Juditsky 1992)."""
    rate = max(0.001, 9 / (step + 9))  # averages about the last ninth of the steps; after 9,000 steps, a thousand
    torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), rate)
    for average, buffer in zip(ema.buffers(), network.buffers()):
        average.copy_(buffer)


def fit(run, stage, networks, loss, validate, draw):
    """The training loop of all stages. best.pt has the lowest validation "loss"; without one, the newest weights.

    networks: an nn.ModuleDict; run.models gets the averages of its "vae" and "prior". loss(index, progress): the loss
    on photographs (n,) after this share of the steps. validate(): figures. draw(path): a picture.
    """
    train, (rank, world) = indices(run.data, TRAIN), processes()
    epochs, batch, peak = (run.config[setting(stage, name)] for name in ("epochs", "batch", "lr"))
    batch = max(1, min(batch, len(train)) // world) * world  # a multiple of the processes, at most the data
    epoch_steps = max(1, len(train) // batch)
    total, period = epochs * epoch_steps, math.ceil(epochs / 30) * epoch_steps  # at most thirty validations
    ema = nn.ModuleDict({name: deepcopy(network) for name, network in networks.items() if name in run.models})
    run.models.update(ema.requires_grad_(False).eval().items())  # the averages validate, draw and are kept
    # AdamW averages gradients; against a critic that learns, older ones mislead: 0.5 forgets them
    optimizer = torch.optim.AdamW([p for p in networks.parameters() if p.requires_grad], fused=True,
                                  betas=(0.5 if stage == "decoder" else 0.9, 0.99))
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    state = {"networks": networks, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    losses, start = restore(run, stage, state)
    saved = began = time.monotonic()
    with defer_signals() as stop, tqdm(desc=stage, total=total * batch, initial=start * batch, unit="img",
                                       leave=False) as bar:
        for step in range(start, total):
            epoch, place = divmod(step, epoch_steps)
            if place == 0 or step == start:
                order = shuffled(train, run.config["seed"] * 1000 + epoch)
            torch.manual_seed(run.config["seed"] * 1_000_003 + step * world + rank)
            value = loss(order[place * batch:(place + 1) * batch][rank::world], step / total)
            take_step(networks, optimizer, scaler, value, learning_rate(step, total, peak))
            for name, average in ema.items():
                update_ema(average, networks[name], step + 1)
            losses.append(value.detach())
            bar.update(batch)
            done, now, stopped = step + 1, time.monotonic(), any_process(stop, run.device)
            validating = done % period == 0 or done == total
            saving = done == total or stopped or now - saved > SAVE_SECONDS
            if done % 20 == 0 or validating or saving:  # reading a number waits for the device: not every step
                bar.set_postfix(loss=f"{check_loss(losses[-1].item(), run, stage):.3f}")
            if validating:
                figures = {"step": done, "epoch": epoch + 1, "train_loss": torch.stack(losses).mean().item()}
                report(run, stage, figures | validate(), speed=(done - start) * batch / (now - began))
                losses.clear()
            if saving and rank == 0:
                save_last(run, stage, state, losses, done)
                save_curves(run.folder / "loss.png", run.history)
                draw(run.folder / "epoch.png")
                saved = now
            if stopped:
                raise KeyboardInterrupt(f"Stopped at step {done} of {total} of the {stage}; nothing is lost. Go "
                                        f"on with: python cvae.py train --resume --run {run.folder}")


def train_stages(run):
    """Train the stages in turn, each on what best.pt has of the one before; a resumed run begins where it stopped."""
    for stage in stages_of(run.config):
        if run.resumed and run.resumed["stage"] != stage:
            continue  # it is finished
        {"vae": train_vae, "decoder": train_decoder, "prior": train_prior}[stage](run)
        run.resumed = None
        if dist.is_initialized():
            dist.barrier()  # until the first process has written
        best = load(run.folder / "best.pt", "checkpoint")
        for name, network in run.models.items():
            if network:
                network.load_state_dict(best[name])


def train_vae(run):
    """Stage 1: encoder and decoder learn to lower minus the ELBO."""
    objective, val = OBJECTIVES[run.config["objective"]], indices(run.data, VAL)
    torch.manual_seed(run.config["seed"])
    vae = make_vae(run.config)
    vae.condition.learn_statistics(run.data, indices(run.data, TRAIN))
    vae = vae.to(run.device, memory_format=torch.channels_last)
    print(f"{run.folder}: the VAE, {count_parameters(vae):,} parameters")
    forward, x = compiled(vae, run), get_images(run.images, val)
    grey = x.mean((0, 2, 3), keepdim=True).expand_as(x)  # the best single colour
    vae.variance.copy_(F.mse_loss(grey, x) + QUANTISATION)
    knowing_nothing = objective(grey, x, x.new_zeros(len(x)), vae.variance).item()
    run.history.setdefault("vae", [{"step": 0, "epoch": 0, "loss": knowing_nothing}])

    def loss(index, progress):
        x = mirror_half(get_images(run.images, index), run.config["flip"])  # (n, 3, S, S)
        with autocast(run.device, run.dtype):
            x_hat, kl = forward(x, *sample_condition(run.data, index))
        variance = mean_over_processes(F.mse_loss(x_hat.detach(), x)) + QUANTISATION  # this batch's best, a constant
        vae.variance.lerp_(variance, 0.02)  # a running mean over fifty steps, to measure with
        # the KL fades in, or it could empty z before the decoder can use it
        return objective(x_hat, x, kl, variance, kl_weight=min(1, 8 * progress))

    def validate():
        return measure_vae(run.models["vae"], run.images, run.data, val, objective)

    fit(run, "vae", nn.ModuleDict({"vae": vae}), loss, validate,
        lambda path: save_reconstructions(path, run.models["vae"], run.images, run.data, val[:8]))


# Try it: the VAE alone, in a minute: epoch.png in tried/vae (loss.png has a line from two epochs on).
#     python cvae.py train --data data/toy.pt --prior normal --epochs 1 --decoder-epochs 0 --no-flip --run tried/vae

# %% 6. The decoder's second lesson -------------------------------------------------------------------
# A latent stands for many pictures: it says "fur here", not where each hair lies. The smallest squared error is that
# of their mean, and a mean of hairs is a smear. A likelihood that judges pixel by pixel asks for no more. So after
# stage 1 a critic joins: a network that looks at patches and learns to tell photographs from reconstructions, while the
# decoder learns to mislead it. Such a pair is a generative adversarial network, a GAN. Larsen et al. (2016, arXiv
# 1512.09300) joined one to a VAE; Esser et al. (2021, arXiv 2012.09841) and Stable Diffusion have critics of patches.
#
#     critic:   max(0, 1 - critic(x)) + max(0, 1 + critic(x_hat))         photographs above 1, reconstructions below -1
#     decoder:  mean of (x - x_hat)² / (2 variance) - w critic(x_hat)     stay near x, and raise the critic's answer
#
# The first is the hinge loss (arXiv 1705.02894): where the critic is right by a margin, it learns no more. Spectral
# norm (Miyato et al. 2018, arXiv 1802.05957) bounds the slope of its layers, and so the gradients for the decoder.
# The second keeps the likelihood, so that the decoder still answers for every pixel. But each pixel has a variance: the
# MSE of the stage 1 decoder, for the same z, in the 9x9 square around it, at most the batch's mean. In a sky it is
# small, and grain costs much; in fur it is large, and texture costs little. With one variance for all, skies turned
# grainy before fur was sharp; without the limit, places that no decoder gets right filled with specks. The encoder is
# frozen: this loss has no KL, so nothing would limit what latents say. `fit` calls `loss` for the photographs `index`.

CRITIC_WEIGHT = 0.3  # less leaves reconstructions blurred, more makes them grainy (assets/experiments.md)
LEAST_VARIANCE = 1e-4  # added to a pixel's: an error of 0.01, two or three of 256 levels, is hardly seen


def make_critic():
    """A critic of patches: pictures (N, 3, S, S) -> (N, 1, S/8, S/8), an answer for 54x54 pixels, every 8 pixels."""
    def conv(channels_in, channels, kernel, stride):
        return nn.utils.parametrizations.spectral_norm(nn.Conv2d(channels_in, channels, kernel, stride, padding=1))

    return nn.Sequential(conv(3, 48, 4, 2), nn.LeakyReLU(0.2), conv(48, 96, 4, 2), nn.LeakyReLU(0.2),
                         conv(96, 128, 4, 2), nn.LeakyReLU(0.2), conv(128, 128, 3, 1), nn.LeakyReLU(0.2),
                         conv(128, 1, 3, 1))


def train_decoder(run):
    """Stage 2: the decoder learns on, against a critic; the encoder is frozen."""
    first, val = run.models["vae"].requires_grad_(False), indices(run.data, VAL)  # of stage 1; last.pt keeps it
    vae = deepcopy(first)  # in evaluation mode, as first is: no dropout in this stage
    for layers in vae.from_latent, vae.decoder, vae.skip_out:  # not vae.condition: the frozen encoder uses it, too
        layers.requires_grad_(True)
    torch.manual_seed(run.config["seed"])
    critic = make_critic().to(run.device, memory_format=torch.channels_last)
    print(f"{run.folder}: the decoder's second lesson, by a critic of {count_parameters(critic):,} parameters")
    first_decode, decode = compiled(first.decode, run), compiled(vae.decode, run)
    psnr = min(run.history["vae"][1:], key=lambda figures: figures["loss"])["psnr"]  # of the VAE in best.pt

    def loss(index, progress):
        x = mirror_half(get_images(run.images, index), run.config["flip"])  # (n, 3, S, S)
        top, left = torch.randint(9, (2,)).tolist()  # crop at random, or it sees the latent's cells at fixed places
        crop = ..., slice(top, top + x.shape[2] - 8), slice(left, left + x.shape[3] - 8)
        condition = sample_condition(run.data, index)
        with autocast(run.device, run.dtype):
            z = sample_posterior(*first.encode(x, *condition))
            x_mean, x_hat = first_decode(z, *condition), decode(z, *condition)
            critic.requires_grad_(False)  # the decoder's step: gradients pass through the critic
            gain = critic(x_hat[crop]).float().mean()
            critic.requires_grad_(True)   # the critic's step: no gradients pass to the decoder
            real, fake = critic(x[crop]).float(), critic(x_hat.detach()[crop]).float()
        variance = F.avg_pool2d((x_mean - x).square().mean(1), 9, stride=1, padding=4, count_include_pad=False)
        variance = variance.clamp(max=variance.mean()) + LEAST_VARIANCE  # (n, S, S), one for each pixel
        nll = ((x_hat - x).square().mean(1) / (2 * variance)).mean()
        decoder_loss = nll - CRITIC_WEIGHT * min(1, 8 * progress) * gain  # the critic is to learn first
        critic_loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        return decoder_loss + critic_loss  # one sum, one optimizer: they share no gradients

    def validate():  # no "loss": decoder and critic have none in common
        figures = measure_vae(run.models["vae"], run.images, run.data, val)
        if not figures["psnr"] > psnr - 3:  # also if it is no number
            raise UserError(f"The critic pulled the decoder away from the photographs: PSNR {figures['psnr']:.1f} dB "
                            f"after {psnr:.1f}. Start anew with a lower --decoder-lr, or --decoder-epochs 0.")
        return {name: figures[name] for name in ("bpd", "psnr")}

    run.history.setdefault("decoder", [{"step": 0, "epoch": 0}])
    fit(run, "decoder", nn.ModuleDict({"vae": vae, "critic": critic, "first": first}), loss, validate,
        lambda path: save_reconstructions(path, run.models["vae"], run.images, run.data, val[:8]))


# Try it: what does the critic change? The same VAE and one epoch of stage 2; compare epoch.png with that of tried/vae.
#     python cvae.py train --data data/toy.pt --prior normal --epochs 1 --decoder-epochs 1 --no-flip --run tried/critic

# %% 7. The prior -----------------------------------------------------------------------------------
# The VAE is trained; now draw z from N(0, I) and decode it: scraps of colour, a picture of nothing. Why? The KL pulls
# each q(z | x, c) towards N(0, I) only as far as the reconstruction allows. So the aggregated posterior, the latents of
# all photographs together, stays another distribution: neighbouring cells agree (sky beside sky), and it depends on c.
# N(0, I) draws latents that no picture has (prior.png shows both). The cure is to learn the prior p(z | c).
#
# Flow matching (Lipman et al. 2023, arXiv 2210.02747 [3]; Liu et al. 2023, arXiv 2209.03003) learns it by
# regression. Join a latent z and noise by a straight line, and walk along it with time t:
#
#     z_t = (1 - t) z + t noise        t = 0: a latent, t = 1: noise        velocity  dz_t / dt = noise - z
#
# A network sees z_t, t and c and predicts the velocity. Many lines cross at z_t; the best prediction is the mean of
# their velocities. A theorem says: from noise, follow these means back to t = 0, and you have a draw from p(z | c).
#
# The decoder's mean was blurred; why is this one not? The decoder answers once, for all pictures that fit. Here a mean
# decides only the next small step. After it fewer latents are possible; in the end the noise at the start has chosen.
#
# The network is a small transformer (DiT, Peebles & Xie 2023, arXiv 2212.09748). Each 2x2 patch of the grid is a token
# (a flat latent is one); in attention it gets a mean of all tokens' values v, weighted by how their keys k fit its q.

TIME_DIM = 64  # numbers that describe the time t
HEADS = 8      # attentions side by side, of W/8 numbers each; with two, one demo night in ten had no moon, or two


class Block(nn.Module):
    """A transformer block on tokens (N, T, W); cond (N, W), time and condition, sets its norms (adaLN-zero, DiT)."""

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.adaln = nn.Linear(width, 6 * width)  # a shift and a scale of the input, a gate on the output; twice
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        hidden = 8 * width // 3 // 64 * 64  # three matrices of 8/3 W²: the work of two of 4 W²; multiples of 64
        self.mlp_in = nn.Linear(width, 2 * hidden)
        self.mlp_out = nn.Linear(hidden, width)
        nn.init.zeros_(self.adaln.weight)  # gates are zero: a new block changes nothing
        nn.init.zeros_(self.adaln.bias)

    def forward(self, h, cond):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaln(cond)[:, None].chunk(6, dim=2)
        normed = F.layer_norm(h, (self.width,)) * (1 + scale_a) + shift_a               # (N, T, W)
        q, k, v = self.qkv(normed).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (N, 8, T, W/8)
        mixed = attention(q, k, v)  # softmax(q k' / √(W/8)) v: each token looks at all
        h = h + gate_a * self.out_proj(mixed.transpose(1, 2).flatten(2))
        normed = F.layer_norm(h, (self.width,)) * (1 + scale_m) + shift_m
        a, b = self.mlp_in(normed).chunk(2, dim=2)  # one half gates the other (SwiGLU, Shazeer 2020, arXiv 2002.05202)
        return h + gate_m * self.mlp_out(F.silu(a) * b)


class Flow(nn.Module):
    """The velocity network. shape: (C, G, G) of a latent; condition_dim: E; width: W; depth: blocks."""

    def __init__(self, shape, condition_dim, width, depth=6):
        super().__init__()
        channels, side, _ = shape
        self.width, self.patch = width, 2 if side > 1 else 1
        token_dim = channels * self.patch**2
        self.condition = Condition(condition_dim, width)
        self.time = nn.Sequential(nn.Linear(TIME_DIM, width), nn.SiLU(), nn.Linear(width, width))
        self.patch_embed = nn.Linear(token_dim, width)
        self.pos_embed = nn.Parameter(0.02 * torch.randn((side // self.patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.adaln = nn.Linear(width, 2 * width)
        self.to_velocity = nn.Linear(width, token_dim)
        for layer in (self.adaln, self.to_velocity):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.register_buffer("latent_mean", torch.zeros(channels, 1, 1))  # each channel is standardised, like noise
        self.register_buffer("latent_std", torch.ones(channels, 1, 1))

    def forward(self, z, t, embedding, modality):
        """Noisy latents (N, C, G, G), times (N,), conditions -> velocities (N, C, G, G)."""
        h = F.pixel_unshuffle(z, self.patch)                                            # (N, 4C, G/2, G/2)
        grid = h.shape[2:]
        h = self.patch_embed(h.flatten(2).transpose(1, 2)) + self.pos_embed             # (N, T, W)
        # t as sines and cosines of many frequencies, so that 0.01 and 0.05 look different (arXiv 1706.03762)
        frequencies = torch.exp(-math.log(10000) * torch.linspace(0, 1, TIME_DIM // 2, device=t.device))
        waves = 1000 * t[:, None] * frequencies
        time = self.time(torch.cat([waves.sin(), waves.cos()], dim=1))                  # (N, W)
        cond = F.silu(time + self.condition(embedding, modality))                       # (N, W)
        for block in self.blocks:
            h = block(h, cond)
        shift, scale = self.adaln(cond)[:, None].chunk(2, dim=2)
        h = self.to_velocity(F.layer_norm(h, (self.width,)) * (1 + scale) + shift)      # (N, T, 4C)
        return F.pixel_shuffle(h.transpose(1, 2).unflatten(2, grid), self.patch)        # (N, C, G, G) again


def flow_loss(flow, z, embedding, modality, p_uncond=0.1):
    """Mean squared error of the velocities predicted for standardised latents z (n, C, G, G): a scalar."""
    # logit-normal times (Esser et al. 2024, arXiv 2403.03206), most above 1/2, where it is decided what goes where
    t = torch.sigmoid(0.75 + torch.randn(len(z), 1, 1, 1, device=z.device))             # (n, 1, 1, 1)
    noise = torch.randn_like(z)
    # guidance (section 8) will ask for the velocity without a condition: a tenth becomes NULL
    modality = torch.where(torch.rand(len(z), device=z.device) < p_uncond, NULL, modality)
    velocity = flow((1 - t) * z + t * noise, t.flatten(), embedding, modality)
    return F.mse_loss(velocity.float(), noise - z)


@torch.no_grad()
def cache_latents(vae, images, data, index, flip=False):
    """q(z | x, c), c always x's own embedding, of x and its mirror: mu, sigma (n, 1 or 2, C, G, G) in float16."""
    mu = torch.empty(len(index), 2 if flip else 1, *vae.shape, device=index.device, dtype=torch.float16)
    sigma = torch.empty_like(mu)
    for place in tqdm(torch.arange(len(index), device=index.device).split(64), "encoding photographs", leave=False):
        x = get_images(images, index[place])
        for version, view in enumerate([x, x.flip(3)] if flip else [x]):
            m, logvar = vae.encode(view, data["image_embeddings"][index[place]], IMAGE)
            mu[place, version], sigma[place, version] = m.half(), torch.exp(logvar / 2).half()
    return mu, sigma


def train_prior(run):
    """Stage 3: the flow learns the latents of the trained VAE."""
    data, train, val = run.data, indices(run.data, TRAIN), indices(run.data, VAL)
    every = torch.arange(len(run.images), device=run.device)
    mu, sigma = cache_latents(run.models["vae"], run.images, data, every, run.config["flip"])
    torch.manual_seed(run.config["seed"])
    flow = make_flow(run.config, run.models["vae"].shape).to(run.device)
    subset = train[:3000]  # enough for statistics; float32 copies of all latents would take much memory
    flow.condition.learn_statistics(data, subset)
    m, s = mu[subset].float(), sigma[subset].float()
    flow.latent_mean.copy_(m.mean((0, 1, 3, 4))[:, None, None])
    # the variance of all z is the variance of their mu plus the mean of their sigma²
    flow.latent_std.copy_((m.var((0, 1, 3, 4)) + (s**2).mean((0, 1, 3, 4))).sqrt()[:, None, None])
    print(f"{run.folder}: the prior, {count_parameters(flow):,} parameters")
    forward = compiled(flow, run)

    def sample_latents(index):  # a new draw from q at each step: the prior learns all of q, not a point
        version = torch.randint(mu.shape[1], (len(index),), device=run.device)  # mirrored or not
        m, s = mu[index, version].float(), sigma[index, version].float()                # (n, C, G, G)
        return (m + s * torch.randn_like(m) - flow.latent_mean) / flow.latent_std

    def loss(index, progress):
        with autocast(run.device, run.dtype):
            return flow_loss(forward, sample_latents(index), *sample_condition(data, index))

    @torch.no_grad()
    def validate():
        torch.manual_seed(0)
        captions = data["caption_embeddings"][val, 0]
        return {"loss": flow_loss(run.models["prior"], sample_latents(val), captions, TEXT, p_uncond=0.0).item()}

    run.history.setdefault("prior", [{"step": 0, "epoch": 0, "loss": 2.0}])  # to predict 0: noise² + z² = 1 + 1
    fit(run, "prior", nn.ModuleDict({"prior": flow}), loss, validate,
        lambda path: save_samples(path, run.models, run.images, data, val[:8]))


# Try it: N(0, I) beside the flow, the same noise through the same decoder. The first is scraps of colour.
#     python cvae.py sample "a sheep on green grass" --prior normal
#     python cvae.py sample "a sheep on green grass"

# %% 8. Sampling ------------------------------------------------------------------------------------
# A prompt becomes a picture in three steps: CLIP's text encoder makes the condition, the prior draws a latent for it,
# the decoder makes the picture. `--image` starts from CLIP's image encoder; `--interpolate` keeps the noise and goes
# from one condition to another; with `--prior normal` the noise is the latent.

GUIDANCE = 1.5  # samples are then recognised about as often as photographs, and vary a little less
STEPS = 16      # more change little


@torch.no_grad()
def sample_flow(flow, noise, embedding, modality, guidance=GUIDANCE, steps=STEPS):
    """Follow the flow from noise (N, C, G, G) to latents: the trajectory, steps + 1 tensors, the last one latents."""
    z, trajectory, previous = noise, [noise], None
    times = torch.linspace(1, 0, steps + 1, device=noise.device)
    for t, t_next in zip(times[:-1], times[1:]):
        velocity = flow(z, t.expand(len(z)), embedding, modality)
        # classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) exaggerates the difference that the condition
        # makes: 1 draws from p(z | c); more fits the prompt better and varies less
        if guidance != 1:
            unconditional = flow(z, t.expand(len(z)), embedding, NULL)
            velocity = unconditional + guidance * (velocity - unconditional)
        # Euler's straight steps lose contrast: extrapolate the last two velocities (Adams-Bashforth, order two)
        ahead = velocity if previous is None else 1.5 * velocity - 0.5 * previous
        z, previous = z + (t_next - t) * ahead, velocity
        trajectory.append(z)
    return [z * flow.latent_std + flow.latent_mean for z in trajectory]


@torch.no_grad()
def generate(models, embedding, modality, noise, guidance=GUIDANCE, steps=STEPS):
    """Draw pictures: embeddings (N, E) of one modality, noise (N, C, G, G) -> (N, 3, S, S) in [0, 1]."""
    pictures, batches = [], list(zip(embedding.split(64), noise.split(64)))  # batches fit in any memory
    for c, z in tqdm(batches, "drawing", leave=False, disable=len(batches) == 1):
        if models["prior"]:
            z = sample_flow(models["prior"], z, c, modality, guidance, steps)[-1]
        pictures.append(models["vae"].decode(z, c, modality))
    return torch.cat(pictures)


# Try it: with guidance 4 pictures are more alike; photographs then also show the prompt more often. And with 2 steps?
#     python cvae.py sample "two cows in the snow" --guidance 1
#     python cvae.py sample "two cows in the snow" --guidance 4
#     python cvae.py sample "two cows in the snow" --steps 2

# %% 9. Evaluation ----------------------------------------------------------------------------------
# A loss says how well pictures are stored, not how well prompts are answered. unCLIP (Ramesh et al. 2022, arXiv
# 2204.06125) asked people three questions. We ask CLIP these and a fourth, always about the test split:
#
#     does the picture show the caption?   CLIP score, and R-precision: of 100 captions, is its own nearest?
#     do samples of one caption differ?    mean distance between their CLIP embeddings
#     do they look like photographs?       CMMD, a distance between two distributions of embeddings
#     are they copies?                     median distance from a sample to the nearest training picture
#
# Photographs are asked, too. CLIP is a biased judge: the model learned with its embeddings. Samples can beat
# photographs in R-precision: they show what CLIP read in a caption, photographs also what it omits. Look at both, too.


def caption_match(images, own, texts):
    """CLIP score, R-precision (arXiv 1711.10485) of embedded pictures (N, E), the i-th with caption texts[own[i]]."""
    cosines = images @ texts.T                                                          # (N, captions)
    weight = 1 / own.bincount()[own]  # all captions count alike, however many pictures one has
    score, hit = cosines.gather(1, own[:, None])[:, 0], (cosines.argmax(1) == own).float()
    mean_score, mean_hit = ((weight @ values / weight.sum()).item() for values in (score, hit))
    return {"CLIP score": 100 * mean_score, "R-precision": mean_hit}


def diversity(images, own):
    """Mean cosine distance of embedded pictures (N, E) that share a caption; of all, where few do."""
    same = (own[:, None] == own).fill_diagonal_(False)                                  # (N, N)
    if same.sum() < len(images):
        same = torch.ones_like(same).fill_diagonal_(False)
    return (1 - images @ images.T)[same].mean().item()


def cmmd(a, b):
    """CMMD (arXiv 2401.09603) of unit vectors (N, E), (M, E): 1000 · MMD², kernel exp(-|u - v|² / (2 · 10²))."""
    def likeness(distances):  # pdist leaves out those to oneself, 0: with them larger sets would seem nearer
        return torch.exp(-distances.square() / (2 * 10**2)).mean()

    a, b = a.cpu().double(), b.cpu().double()
    return 1000 * (likeness(F.pdist(a)) + likeness(F.pdist(b)) - 2 * likeness(torch.cdist(a, b))).item()


def nearest_neighbour(images, others):
    """Distance from each unit vector (N, E) to the nearest of others (M, E), and which it is: (N,), (N,)."""
    cosine, which = (images @ others.T).max(1)
    return 1 - cosine, which


def compute_metrics(images, own, texts, reference, training, asked=slice(None)):
    """All four answers about embedded pictures (N, E), of which images[asked] have captions texts[own]: a dict."""
    return caption_match(images[asked], own, texts) | {
        "diversity": diversity(images[asked], own), "CMMD": cmmd(images, reference),
        "nearest": nearest_neighbour(images, training)[0].median().item()}


# Try it: the rows of guidance 1 and 4: what rises, what falls? Are there copies in the run's nearest.png?
#     python cvae.py evaluate --guidance 4

# %% Appendix A. A toy world --------------------------------------------------------------------------
# For those without COCO, CLIP's weights or a GPU: a COCO folder of pastures drawn with a few ellipses, and a
# miniature CLIP trained on them. `demo` gives both to the usual commands.

SUBJECTS = {"sheep": "sheep", "cow": "cows", "horse": "horses"}
GROUNDS = {"grass": ("on green grass", "in a meadow"), "snow": ("in the snow", "on a snowy field"),
           "field": ("on a bare field", "on brown earth")}
SKIES = {"blue": ("under a blue sky", "on a sunny day"), "grey": ("under a grey sky", "on a cloudy day"),
         "sunset": ("at sunset", "under a red evening sky"), "night": ("at night", "under the stars")}
RELIEFS = {"hills": ("with hills behind", "below a hill"), "mountains": ("in front of mountains", "in the mountains")}
# never drawn, neither for CLIP nor for the VAE: what the model makes of these, it composed by itself
UNSEEN = [("cow", "snow", "sunset"), ("sheep", "field", "night"), ("horse", "grass", "grey"), ("sheep", "snow", "blue")]
# of the sky the colours at the top and at the horizon
SKY_COLOURS = {"blue": ((60, 130, 225), (175, 215, 245)), "grey": ((135, 140, 146), (190, 193, 196)),
               "sunset": ((84, 44, 110), (236, 120, 56)), "night": ((8, 12, 40), (38, 48, 100))}
GROUND_COLOURS = {"grass": (84, 158, 52), "snow": (236, 241, 249), "field": (156, 108, 62)}
LIGHT = {"blue": (1, 1, 1), "grey": (0.9, 0.9, 0.92), "sunset": (1, 0.86, 0.78), "night": (0.56, 0.6, 0.72)}
# An animal: three colours (coat, dark, pale), where its legs begin, and shapes of one of these colours, in units of its
# width, y upwards negative. Two points are the box of an ellipse, more are a polygon.
ANIMALS = {
    "sheep": (((246, 240, 222), (30, 28, 28), (225, 216, 196)), -.3, [(0, -.47, -.54, -.09, -.22),
        (0, -.31, -.62, .07, -.3), (0, -.11, -.63, .27, -.31), (0, .05, -.56, .43, -.24), (0, -.39, -.46, -.01, -.14),
        (0, -.19, -.46, .19, -.14), (0, -.01, -.46, .37, -.14), (0, -.34, -.54, .34, -.18), (2, -.28, -.37, .12, -.23),
        (1, .33, -.6, .53, -.34), (1, .28, -.6, .44, -.52), (0, .28, -.66, .44, -.54)]),
    "cow": (((158, 72, 36), (110, 48, 24), (250, 246, 238)), -.34, [(0, -.4, -.63, .4, -.25),
        (0, -.36, -.56, .34, -.58, .36, -.34, -.36, -.32), (2, -.3, -.6, -.06, -.4), (2, .02, -.48, .22, -.32),
        (1, -.39, -.52, -.43, -.5, -.44, -.18, -.41, -.18), (0, .26, -.6, .42, -.68, .46, -.5, .3, -.4),
        (0, .36, -.68, .56, -.44), (2, .43, -.54, .57, -.42), (2, .38, -.66, .36, -.78, .43, -.67),
        (2, .47, -.66, .52, -.77, .52, -.64)]),
    "horse": (((44, 34, 32), (20, 16, 16), (90, 74, 66)), -.46, [(0, -.36, -.72, .36, -.4),
        (0, .18, -.6, .36, -.98, .48, -.9, .34, -.48), (1, .12, -.66, .32, -1, .38, -.98, .24, -.6),
        (0, .34, -.98, .44, -1, .62, -.8, .56, -.72, .4, -.84), (1, .36, -.98, .38, -1.08, .42, -.98),
        (1, -.32, -.64, -.46, -.56, -.48, -.22, -.38, -.3)])}


def draw_animal(draw, animal, place, width, facing, shade):
    """Draw an animal that stands at `place` (x, y), `width` pixels long, facing -1 (left) or 1 (right)."""
    (x, y), (colours, leg_top, shapes) = place, ANIMALS[animal]
    legs = [(1, leg - .04, leg_top, leg + .04, leg_top, leg + .035, 0, leg - .035, 0) for leg in (-.3, -.17, .17, .3)]
    for colour, *numbers in legs + shapes:
        xs, ys = [x + facing * width * px for px in numbers[::2]], [y + width * py for py in numbers[1::2]]
        if len(xs) == 2:
            draw.ellipse((min(xs), ys[0], max(xs), ys[1]), shade(colours[colour]))
        else:
            draw.polygon(list(zip(xs, ys)), shade(colours[colour]))


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

    def shade(colour, factor=1.0):  # a colour in this light
        return tuple(int(value * tint * factor) for value, tint in zip(colour, light))

    def disc(x, y, r, colour, flat=1.0):  # in units of the picture
        draw.ellipse([SIZE * v for v in (x - r, y - r * flat, x + r, y + r * flat)], colour)

    if sky == "night":
        for number in range(16):  # the same stars every night
            disc(number * 0.618 % 1, 0.03 + number * 0.377 % 0.33, 0.006, (235, 235, 215))
        disc(dice.choice((0.2, 0.5, 0.8)), 0.16, 0.07, (245, 240, 210))
    elif sky == "sunset":
        disc(dice.choice((0.2, 0.5, 0.8)), 0.16, 0.08, (255, 230, 140))  # clear of hills and peaks, or models draw two
    else:
        cloud, shift = (250, 251, 253) if sky == "blue" else (172, 175, 180), dice.choice((0.0, 0.3, 0.6))
        for place, height, r in ((0.15, 0.13, 0.08), (0.6, 0.2, 0.07)):
            for dx, dy in ((-1.2, 0.3), (0, 0), (1.1, 0.35)):
                disc((place + shift) % 1 + dx * r, height + dy * r, r, cloud, flat=0.6)
    if relief == "mountains":
        for place, height in ((0.1, 0.15), (0.75, 0.13), (0.4, 0.2)):
            x, height = (place + variant) % 1 * SIZE, height * SIZE
            for share, colour in ((1, (106, 112, 132)), (0.3, (240, 243, 248))):  # rock, then a snowy top
                foot, half = horizon - (1 - share) * height, 1.2 * share * height
                draw.polygon([(x - half, foot), (x, horizon - height), (x + half, foot)], shade(colour))
    else:
        for layer, factor in ((0.09, 0.72), (0.04, 0.84)):
            xs, phase = range(0, SIZE + 4, 4), 6.3 * (variant + 5 * layer)
            line = [(x, horizon - layer * SIZE * (1 + 0.8 * math.sin(phase + 18 * x / SIZE))) for x in xs]
            draw.polygon([*line, (SIZE, SIZE), (0, SIZE)], shade(earth, factor))
    draw.rectangle((0, horizon, SIZE, SIZE), shade(earth))
    for x in {1: [0.32 if side == "left" else 0.68], 2: [0.26, 0.74], 3: [0.18, 0.5, 0.82]}[count]:
        place = (x + dice.uniform(-0.015, 0.015)) * SIZE, dice.uniform(0.87, 0.9) * SIZE
        draw_animal(draw, animal, place, (0.56, 0.44, 0.34)[count - 1] * SIZE, 1 if side == "left" else -1, shade)
    return picture


def caption_pasture(scene, dice):
    """Five captions of a scene; the first one says how many of what, on which ground, under which sky."""
    animal, ground, sky, relief, count, side = scene
    subject = (f"a {animal}", f"two {SUBJECTS[animal]}", f"three {SUBJECTS[animal]}")[count - 1]
    where = f"on the {side}" if count == 1 else "side by side"
    grounds, skies, reliefs = (dice.sample(both, 2) for both in (GROUNDS[ground], SKIES[sky], RELIEFS[relief]))
    return [f"{subject} {GROUNDS[ground][0]} {SKIES[sky][0]}", f"{subject} {grounds[0]} {skies[0]}, {reliefs[0]}",
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
    for number in tqdm(range(count), "drawing pastures", unit="img"):
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
    pixels = torch.stack([centre_square(load_image(root / "toy" / p["file_name"], 48), 48)
                          for p in tqdm(photographs, "reading pastures", unit="img")])
    pixels = (pixels / 255 - CLIP_MEAN) / CLIP_STD                                      # (N, 3, 48, 48)
    tokens = clip.tokenize([caption for p in photographs for caption in p["captions"]], 24).view(-1, CAPTIONS, 24)
    torch.manual_seed(0)
    model = CLIP(embed_dim=32, image_resolution=48, vision_layers=2, vision_width=64, vision_patch_size=8,
                 context_length=24, vocab_size=49408, transformer_width=64, transformer_heads=1, transformer_layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in tqdm(range(steps), "training a miniature CLIP"):
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

def choose_device(request=None):
    """The device that was asked for, or the fastest that PyTorch sees; under torchrun each process has its own."""
    available = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if request and request not in available:
        raise UserError(f"PyTorch sees no {request} device here; --device takes: {', '.join(available)}.")
    name, rank = request or available[0], int(os.environ.get("LOCAL_RANK", 0))
    if name == "cuda" and rank > 0 and rank >= torch.cuda.device_count():
        raise UserError(f"There are only {torch.cuda.device_count()} cards: torchrun --nproc_per_node takes no more.")
    return torch.device(name, rank) if name == "cuda" else torch.device(name)


def choose_precision(device, request=None):
    """The number format of convolutions and matrix products, by default the fastest that serves."""
    possible = {"cuda": ["bfloat16", "float16", "float32"], "mps": ["float32"],
                "cpu": ["float32", "bfloat16", "float16"]}[device.type]
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        possible.remove("bfloat16")  # an older card (Colab's T4) only emulates it, slowly
    capable = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16")
    if device.type == "cpu" and capable and torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        possible = ["bfloat16", "float32", "float16"]  # it has the instructions, and PyTorch may use them
    if request and request not in possible:
        raise UserError(f"This {device.type} can't compute in {request}; --precision takes: {', '.join(possible)}.")
    return getattr(torch, request or possible[0])


def autocast(device, dtype):
    """Within this context convolutions and matrix products compute in dtype."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def attention(q, k, v):
    """softmax(q k' / √D) v, of q, k and v (N, heads, T, D) each."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):  # in bfloat16 its gradient takes a processor eight times as long
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float())


def compiled(network, run):
    """The network, compiled where that pays, on CUDA; what can't be compiled there runs as it is."""
    if run.device.type != "cuda" or not run.config["compile"]:
        return network
    if run.dtype != torch.float32:
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32
    torch._dynamo.config.suppress_errors = True
    return torch.compile(network)


# `torchrun --nproc_per_node N -- cvae.py train ...` starts several processes. Each takes its share of every batch, and
# all take the same step, along the mean of their gradients. The first one writes and prints.

def processes():
    """Which process this is, and how many there are: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mean_over_processes(tensor):
    """The mean of all processes' tensors, which have no gradient."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def average_gradients(networks):
    """Replace all gradients by their means over the processes, in one message."""
    if dist.is_initialized():
        gradients = [p.grad for p in networks.parameters() if p.grad is not None]
        message = mean_over_processes(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, mean in zip(gradients, message.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(mean.view_as(gradient))


def any_process(stop, device):
    """Whether any process was told to stop: all must leave the loop after the same step."""
    if not dist.is_initialized():
        return bool(stop)
    return mean_over_processes(torch.tensor(float(bool(stop)), device=device)).item() > 0


@contextlib.contextmanager
def several_processes(device):
    """Under torchrun, join the other processes; all but the first are silent."""
    if "RANK" not in os.environ:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    with open(os.devnull, "w") as nowhere:
        out, err = (nowhere, nowhere) if dist.get_rank() > 0 else (sys.stdout, sys.stderr)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield
    dist.destroy_process_group()


# Expected failures, and files that are never half written ------------------------------------------

class UserError(Exception):
    """An expected failure. Its text says what happened and what to do; main() prints just that."""


def first_line(error):
    """The first line of an exception's text, or its name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@contextlib.contextmanager
def atomic(path):
    """A temporary path, renamed to `path` if the block succeeds: nobody ever meets half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def must_be_writable(path):
    """Raise UserError before the work, not after it, if no file can be written at `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"Nothing can be written in {path.parent}: {error.strerror}.") from error
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a file that could be written.")


VERSIONS = {"data file": 3, "checkpoint": 12}  # of the two kinds of files that save writes and load reads


def save(content, path, kind):
    """Write a dict of tensors, numbers and strings to `path`, atomically, even if the power fails."""
    try:
        with atomic(path) as temporary, open(temporary, "wb") as file:
            torch.save({"kind": kind, "version": VERSIONS[kind], **content}, file)
            file.flush()
            os.fsync(file.fileno())  # it is on the disk before it takes the old one's place
    except (OSError, RuntimeError) as error:  # a full disk is either, depending on where it strikes
        raise UserError(f"{path} could not be written ({first_line(error)}); the old one is untouched.") from error


def load(path, kind):
    """Read a file that `save` wrote. weights_only runs no code from it; mmap reads pictures when they are needed."""
    anew = f"python cvae.py {'prepare' if kind == 'data file' else 'train'}"
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} has changed since it was written")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "data file")
    except FileNotFoundError:
        moved = "If it has moved, say where with --data; else make" if kind == "data file" else "Make"
        raise UserError(f"There is no {kind} at {path}. {moved} one first: {anew}") from None
    except Exception as error:  # torch reports damage with half a dozen exception types
        raise UserError(f"{path} is no readable {kind} ({first_line(error)}).") from error
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise UserError(f"{path} is not a {kind} of this program.")
    if content.get("version") != VERSIONS[kind]:
        raise UserError(f"{path} is of version {content.get('version')}, not {VERSIONS[kind]}; make it anew: {anew}")
    return content


# Reading captions, photographs and CLIP ------------------------------------------------------------

# A name from a file is a place below a folder: no drive, no part that is empty or .., no . at the end
UNSAFE_NAME = re.compile(r"^[A-Za-z]:|[\\\0-\x1f\x7f-\x9f\ud800-\udfff]|(^|/)(\s*(\.\.)?\s*(/|$)|\.$)")


def as_id(value):
    """An id as text, so that 7, 7.0 and "7" are the same photograph. Names are ids, too."""
    if type(value) not in (int, float, str):  # a bool is no id
        raise ValueError(f"{value!r} is no id")
    return str(int(value) if isinstance(value, float) else value).strip()


def read_records(path):
    """Images and annotations of a COCO captions file; a few that can't be read are counted and left out."""
    try:
        content = json.loads(text := Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"There is no captions file at {path}; see --coco and --split.") from None
    except (ValueError, RecursionError) as error:
        layout = "in JSON lines" if "Extra data" in str(error) else "no JSON, or damaged, or cut short"
        raise UserError(f"{path} is not a COCO captions file: it is {layout}.") from error
    listed = content if isinstance(content, dict) else {}
    missing = [key for key in ("images", "annotations") if not isinstance(listed.get(key), list)]
    if missing:
        layout = ("a list, as of results" if isinstance(content, list) else "the Karpathy split, images with sentences"
                  if b'"sentences"' in text else f"without a list of {missing[0]}")
        raise UserError(f"{path} is not a COCO captions file: it is {layout}.")
    fields = {field for record in listed["annotations"] if isinstance(record, dict) for field in record}
    if "category_id" in fields and "caption" not in fields:
        raise UserError(f"{path} holds COCO's instances (outlines), not captions; take captions_... beside it.")
    images, annotations, total = [], [], len(listed["images"]) + len(listed["annotations"])
    unreadable = contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, OverflowError)
    for record in listed["images"]:
        with unreadable:
            name, size = record["file_name"], (int(record["width"]), int(record["height"]))
            image = {"id": as_id(record["id"]), "file_name": name, "size": size}
            if min(size) > 0:
                if UNSAFE_NAME.search(name):
                    raise UserError(f"{path} names a photograph {name!r}, which is not a plain file name.")
                images.append(image)
    for record in listed["annotations"]:
        with unreadable:
            if caption := record["caption"].strip():
                annotations.append({"image_id": as_id(record["image_id"]), "caption": caption})
    bad = total - len(images) - len(annotations)
    if bad > 0.05 * total:
        raise UserError(f"{path} is not a COCO captions file: {bad} of its {total} records can't be read.")
    if bad:
        print(f"{bad} of {total} records in {path} lack an id, caption, name or size: skipped.")
    return images, annotations


def read_captions(path, words):
    """Photographs with one of `words` in a caption: dicts with id, file_name, size (width, height) and captions."""
    images, annotations = read_records(path)
    # pycocotools joins the two lists; it wants captions numbered, and it prints
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
        hint = " Separate words by spaces, not by commas." if "," in "".join(words) else ""
        raise UserError(f"No caption in {path} mentions any of: {', '.join(words)}.{hint}")
    return chosen


def is_there(folder, photograph):
    """Whether a photograph is a file in `folder`. A link that leads elsewhere is refused, as such a name is."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # too long a name, a link to itself, ...
        if not (path := (folder / photograph["file_name"]).resolve()).is_relative_to(folder.resolve()):
            raise UserError(f"{folder} holds a link to {path}. Link the whole folder, or copy the photographs.")
        return path.is_file()


def load_image(path, box):
    """A photograph as a PIL RGB image that holds `box` pixels squared; OSError or ValueError if it is no sane one."""
    try:
        with Image.open(path) as photograph:
            if photograph.width * photograph.height > Image.MAX_IMAGE_PIXELS:  # Pillow refuses at twice that
                raise ValueError(f"{photograph.width} x {photograph.height} pixels: a decompression bomb?")
            photograph.draft("RGB", (box, box))  # JPEG can decode straight to 1/2, 1/4, 1/8: much faster
            photograph.load()
            if photograph.mode.startswith("I"):  # 16-bit grey: Pillow would clip it to white
                photograph = Image.fromarray((np.asarray(photograph) // 257).astype(np.uint8))
            return ImageOps.exif_transpose(photograph).convert("RGB")
    except OSError:
        raise
    except Exception as error:  # Pillow raises a dozen types for odd files and odd EXIF: struct.error, TypeError, ...
        raise ValueError(first_line(error)) from error


def load_clip(name, device="cpu", fingerprint=None):
    """CLIP by model name ("ViT-B/32": fetched once to ~/.cache/clip) or weights file; a run names its fingerprint."""
    from clip import available_models, load  # pip's other clip has neither: main explains
    if not os.path.isfile(name):  # people write ViT-B-32, and open_clip ViT-B-32-quickgelu
        plain, *known = (re.sub("[^a-z0-9]|quickgelu|px", "", n.lower()) for n in [name, *available_models()])
        nearest = difflib.get_close_matches(plain, known, 1, 0)[0]
        wish, name = name, available_models()[known.index(nearest)]
        if nearest != plain:
            hint = "" if re.search(r"^[.~/\\]|\.\w+$", wish) else f" and no such model; the nearest is {name}"
            raise UserError(f"--clip {wish}: there is no such file{hint}.")
    try:
        model = load(name, device=device)[0]
    except Exception as error:
        raise UserError(f"--clip {name} could not be loaded or fetched ({first_line(error)}).") from error
    if fingerprint and clip_fingerprint(model) != fingerprint:
        raise UserError(f"{name} is not the CLIP that this model was trained with.")
    return model if torch.device(device).type == "cuda" else model.float()


def clip_fingerprint(model):
    """A short hash of a CLIP's weights: embeddings of two different CLIPs must never be mixed."""
    return hashlib.sha256(model.text_projection.detach().cpu().half().numpy().tobytes()).hexdigest()[:16]


def embed_photographs(model, paths, device, batch=32):
    """Of the photographs that can be read: their indices, pixels uint8 (M, 3, 128, 128) and embeddings (M, E)."""
    side, cores = model.visual.input_resolution, torch.get_num_threads()

    def work(numbers):  # a list of (number, pixels, embedding), and one of complaints
        squares, problems = {}, []
        for number in numbers:
            try:
                photograph = load_image(paths[number], max(side, SIZE))
                squares[number] = centre_square(photograph, SIZE), centre_square(photograph, side)
            except (OSError, ValueError) as error:
                problems.append(f"skipped: {paths[number]}: {first_line(error)}")
        if not squares:
            return [], problems
        for_vae, for_clip = zip(*squares.values())
        return list(zip(squares, for_vae, encode_images(model, torch.stack(for_clip).to(device)))), problems

    # Each core works through batches of its own: threads that share a batch wait for each other after every layer.
    # Decoding hardly holds Python's lock, so threads will do. Two that use a Mac's GPU at once can crash PyTorch.
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(1 if device.type == "mps" else cores)
    batches = [range(len(paths))[i:i + batch] for i in range(0, len(paths), batch)]
    images = torch.zeros(len(paths), 3, SIZE, SIZE, dtype=torch.uint8)  # one array, filled as pictures arrive
    kept, embeddings = [], []
    try:
        results = pool.map(work, batches)
        for found, problems in tqdm(results, "CLIP, images", len(batches), unit="img", unit_scale=batch):
            for problem in problems:
                tqdm.write(problem)
            for number, pixels, embedding in found:
                images[len(kept)] = pixels
                kept.append(number)
                embeddings.append(embedding)
    finally:  # also on Ctrl-C: what has not started never does
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)
    if not kept:
        raise UserError("None of the photographs can be read.")
    return kept, images[:len(kept)], torch.stack(embeddings).cpu()


# Data files, and what training asks of them --------------------------------------------------------

def load_data(path, device=CPU, fingerprint=None):
    """What `prepare` wrote; a run names its fingerprint. Pictures stay memory-mapped, embeddings go to the device."""
    data = load(path, "data file")
    if fingerprint and data["fingerprint"] != fingerprint:
        raise UserError(f"{path} is not the data that this run was trained on; if that has moved: --data FILE.")
    return data | {name: data[name].to(device) for name in ("image_embeddings", "caption_embeddings", "split")}


def indices(data, split):
    """The numbers of the photographs in one split of the data: (n,)."""
    return (data["split"] == split).nonzero()[:, 0]


def pool_images(images, size):
    """uint8 (N, 3, 128, 128) -> uint8 (N, 3, size, size), by averaging."""
    factor = images.shape[-1] // size
    if factor == 1:
        return images
    return torch.cat([F.avg_pool2d(batch.float(), factor).round().byte() for batch in images.split(1024)])


def get_images(images, index):
    """Pictures by number, on the index's device: (n, 3, S, S) in [0, 1], channels last (faster convolutions)."""
    batch = images[index.to(images.device)].to(index.device)
    return (batch.float() / 255).contiguous(memory_format=torch.channels_last)


def mirror_half(x, wanted):
    """Pictures (n, 3, S, S), each mirrored or not: a mirrored photograph is another photograph."""
    return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x) if wanted else x


def shuffled(index, seed):
    """The same numbers in an order that the seed determines, on every device the same."""
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))
    return index[order.to(index.device)]


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of pictures (N, 3, S, S) in [0, 1]: (N,)."""
    ramp = torch.exp(-0.5 * ((torch.arange(11, device=a.device) - 5) / 1.5) ** 2)
    window = (ramp[:, None] * ramp / ramp.sum() ** 2).expand(3, 1, 11, 11)
    mean_a, mean_b, mean_aa, mean_bb, mean_ab = (F.conv2d(t, window, groups=3) for t in (a, b, a * a, b * b, a * b))
    variances, covariance = mean_aa - mean_a**2 + mean_bb - mean_b**2, mean_ab - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)
            / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))).flatten(1).mean(1)


@torch.no_grad()
def measure_vae(vae, images, data, index, objective=elbo_loss):
    """Figures on photographs, with the variance of training: dict with loss, bpd, kl (nats) and psnr (dB)."""
    torch.manual_seed(0)  # the same noise at every call
    total = torch.zeros(4, device=index.device)
    for batch in index.split(64):
        x = get_images(images, batch)
        x_hat, kl = vae(x, data["image_embeddings"][batch], IMAGE)
        total += len(x) / len(index) * torch.stack([
            objective(x_hat, x, kl, vae.variance),
            elbo_loss(x_hat, x, kl, vae.variance), kl.mean(), F.mse_loss(x_hat, x)])
    loss, bpd, kl, mse = total.tolist()
    return {"loss": loss, "bpd": bpd, "kl": kl, "psnr": -10 * math.log10(mse)}


@contextlib.contextmanager
def defer_signals():
    """Within the block Ctrl-C, and SIGTERM (Slurm, docker, a shutdown), only leave a note in this list."""
    notes = []
    previous = {number: signal.signal(number, lambda *_: notes.append(1)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield notes
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def check_loss(loss, run, stage, baseline_loss=math.inf):
    """The loss, unless it is no number any more, or worse than that of knowing nothing."""
    if math.isfinite(loss) and loss <= baseline_loss:
        return loss
    rate = setting(stage, "lr")
    what = f"is {loss:.3g}, and knowing nothing costs {baseline_loss:.3g}" if math.isfinite(loss) else "became NaN"
    raise UserError(f"Training diverged: its loss {what}. {run.folder} keeps its last good checkpoint; start anew with "
                    f"a lower rate, such as {option(rate)} {run.config[rate] / 2:g}.")


# Runs and checkpoints ------------------------------------------------------------------------------

def make_vae(config):
    return VAE(config["size"], config["condition_dim"], config["latents"], config["dropout"], config["channels"],
               config["vae_width"])


def make_flow(config, shape):
    return Flow(shape, config["condition_dim"], config["prior_width"], config["prior_depth"])


def count_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def save_checkpoint(run, file, training=None):
    """Write what sampling needs and, in last.pt, what resuming needs besides. The first process writes."""
    if processes()[0] == 0:
        weights = {name: network and network.state_dict() for name, network in run.models.items()}
        content = {"config": run.config, "history": run.history, "training": training, **weights}
        save(content, run.folder / file, "checkpoint")


def save_last(run, stage, state, losses, done):
    """Write last.pt: all that has a state_dict, the losses since the last report, the number of steps done."""
    training = {name: stateful.state_dict() for name, stateful in state.items()}
    training |= {"stage": stage, "losses": [float(loss) for loss in losses], "done": done}
    save_checkpoint(run, "last.pt", training)


def restore(run, stage, state):
    """Begin a stage, or go on where last.pt left it: the losses since the last report, the number of steps done."""
    if not run.resumed:
        save_last(run, stage, state, [], 0)
        return [], 0
    for name, stateful in state.items():
        if run.resumed[name]:  # a scaler's is empty unless it was float16 that the run computed in
            stateful.load_state_dict(run.resumed[name])
    return [torch.tensor(loss, device=run.device) for loss in run.resumed["losses"]], run.resumed["done"]


def report(run, stage, figures, speed):
    """Keep and print the figures of a validation; write best.pt if its loss is the lowest, or where it has none."""
    first, *others = run.history[stage]
    if "loss" in figures:
        begins = figures["step"] <= 2 * WARM_UP
        # worse than it was, but not on what it learns from: it overfits, and best.pt keeps what generalised best
        overfits = figures["train_loss"] < first["loss"] and any(other["loss"] < first["loss"] for other in others)
        check_loss(figures["loss"], run, stage, math.inf if begins or overfits else first["loss"])
    run.history[stage].append(figures)
    if all(figures.get("loss", -math.inf) < other.get("loss", math.inf) for other in others):
        save_checkpoint(run, "best.pt")
    measured = ", ".join(f"{name} {value:.4g}" for name, value in list(figures.items())[3:])
    print(f"{stage}, epoch {figures['epoch']}/{run.config[setting(stage, 'epochs')]}: training loss "
          f"{figures['train_loss']:.3f}, validation {measured}; {speed:.0f} images/s")


def checkpoint_path(name, file="best.pt"):
    """The checkpoint that the user named, by its own path or its run folder; by default the newest run's."""
    if name:
        return Path(name) / file if Path(name).is_dir() else Path(name)
    files = sorted(Path("runs").glob(f"*/{file}"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError("There is no trained model in runs/ yet; train one first: python cvae.py train")
    return files[-1]


def claim_run(name, config):
    """Make a run's folder, and fail if it is there: two trainings never share one."""
    while True:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = Path(name or f"runs/{stamp}-{config['size']}-{config['latents']}-{config['prior']}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError as error:
            if name:
                raise UserError(f"{name} exists already; choose another --run, or go on by --resume.") from error
            time.sleep(1)  # another training began within this second


def setting(stage, name):
    """What CONFIG calls a stage's "epochs", "batch" or "lr"."""
    return name if stage == "vae" else f"{stage}_{name}"


def stages_of(config):
    """The stages of a training in their order, each with the setting of its length."""
    stages = ["vae", "decoder", "prior"] if config["prior"] == "flow" else ["vae", "decoder"]
    return {stage: setting(stage, "epochs") for stage in stages if config[setting(stage, "epochs")]}


def option(name):
    """A setting of CONFIG as it is typed."""
    return "--" + name.replace("_", "-")


def resume(args, given):
    """A resumed run's folder, configuration and checkpoint. It may become longer, and its data may have moved."""
    folder = Path(args.run) if args.run else checkpoint_path(None, "last.pt").parent
    checkpoint = load(folder / "last.pt", "checkpoint")  # no other: best.pt can't say how far the training was
    config, stages = checkpoint["config"], stages_of(checkpoint["config"])
    lengths = list(stages.values())[list(stages).index(checkpoint["training"]["stage"]):]  # of what can be longer
    if args.model or any(name != "data" and (name not in lengths or n < config[name]) for name, n in given.items()):
        larger = " or ".join(map(option, lengths))
        raise UserError(f"{folder} goes on with its own settings; only --data and a larger {larger} can be given.")
    return folder, config | given, checkpoint


def open_run(args, device):
    """The run that train's options describe: a new one in a folder of its own, or a resumed one."""
    given = {name: value for name, value in vars(args).items() if name in CONFIG and value is not None}
    if args.resume:
        folder, config, checkpoint = resume(args, given)
    else:
        model = args.model or ("base" if device.type == "cuda" else "small")
        print(f"--model {model}, " + ("as you asked" if args.model else f"the size for {device.type}"))
        config, checkpoint = CONFIG | MODELS[model] | given, None
    data = load_data(config["data"], device, config.get("fingerprint"))
    config |= {"condition_dim": data["image_embeddings"].shape[-1]}
    config |= {name: data[name] for name in ("clip", "clip_fingerprint", "fingerprint")}
    images = pool_images(data["images"], config["size"])                                # uint8 (N, 3, S, S)
    if device.type != "cuda" or images.nbytes < 0.5 * torch.cuda.mem_get_info()[0]:  # else batches are copied as needed
        images = images.to(device)
    if not checkpoint:
        names = [str(claim_run(args.run, config)) if processes()[0] == 0 else None]
        if dist.is_initialized():
            dist.broadcast_object_list(names)
        folder = Path(names[0])
    dtype = choose_precision(device, args.precision)
    print(f"{folder}: {len(indices(data, TRAIN))} photographs of {config['size']} pixels, on {device} in {dtype}")
    run = Run(folder, config, data, images, device, dtype, {"vae": None, "prior": None}, {})
    if checkpoint:
        run.models = build_models(checkpoint, device)
        run.history, run.resumed = checkpoint["history"], checkpoint["training"]
    return run


def build_models(checkpoint, device):
    """The networks of a checkpoint, ready to sample: {"vae", "prior" (None: use N(0, I))}."""
    config = checkpoint["config"]
    vae = make_vae(config).to(memory_format=torch.channels_last)
    models = {"vae": vae, "prior": make_flow(config, vae.shape) if checkpoint["prior"] else None}
    for name, network in models.items():
        if network:
            network.to(device).eval().requires_grad_(False).load_state_dict(checkpoint[name])
    return models


def load_models(path, device):
    """The networks of a trained run and its configuration."""
    checkpoint = load(path, "checkpoint")
    return build_models(checkpoint, device), checkpoint["config"]


def open_newest_run():
    """For trying things: the newest run's networks, its data, eight validation pictures and their embeddings."""
    models, config = load_models(checkpoint_path(None), CPU)
    data = load_data(config["data"])
    index = indices(data, VAL)[:8]
    x = get_images(pool_images(data["images"], config["size"]), index)
    return models, data, x, data["image_embeddings"][index]


def flow_options(args, models):
    """--guidance and --steps, which are refused where there is no flow to guide."""
    given = args.guidance is not None or args.steps is not None or getattr(args, "show_steps", False)
    if given and not models["prior"]:
        raise UserError("--guidance, --steps and --show-steps are for a learned prior, and this model has none.")
    return GUIDANCE if args.guidance is None else args.guidance, args.steps or STEPS


# Prompts and pictures ------------------------------------------------------------------------------

def read_requests(args, clip_model, device):
    """What to draw, a row each: a list of (label, embedding (1, E), modality). Says when CLIP cuts a prompt."""
    import clip
    requests, side = [], clip_model.visual.input_resolution
    if args.image:
        try:
            square = centre_square(load_image(args.image, side), side)[None].to(device)
        except (OSError, ValueError) as error:
            raise UserError(f"{args.image} is no picture that can be read ({first_line(error)}).") from error
        requests.append((f"variations of {Path(args.image).name}", encode_images(clip_model, square), IMAGE))
    for prompt in args.prompts:
        if not prompt.strip():
            raise UserError("A prompt is empty; say what the picture should show.")
        try:
            clip.tokenize([prompt], clip_model.context_length)
        except RuntimeError:
            print(f"This prompt was cut; CLIP reads {clip_model.context_length} tokens: {prompt[:60]}...")
        requests.append((prompt, encode_texts(clip_model, [prompt]), TEXT))
    return requests


def slerp(a, b, steps):
    """Points on the arc from a (E,) to b (E,): (steps, E). A chord would leave the sphere of embeddings."""
    angle = torch.arccos(F.cosine_similarity(a, b, dim=0).clamp(-1, 1)).clamp(min=1e-4)
    share = torch.linspace(0, 1, steps, device=a.device)[:, None]
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def sample_path(folder, label):
    """A new file name in `folder`, made of the label's letters and digits of any script."""
    text = unicodedata.normalize("NFKC", label).lower()
    text = "".join(c if unicodedata.category(c)[0] in "LMN" else "-" for c in text)
    encoding = sys.getfilesystemencoding(), "ignore"  # under LC_ALL=C it may be ASCII
    name = re.sub("-+", "-", text).encode(*encoding)[:120].decode(*encoding).strip("-") or "sample"
    name = re.sub(r"^(con|prn|aux|nul|(com|lpt)\d)$", r"sample-\1", name)  # these are devices on Windows
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
    with new_figure(path, len(rows), 1, (width, 1.65 * len(rows))) as axes:
        for axis, row, label in zip(axes[:, 0], rows, labels):
            label = label.encode(errors="replace").decode()  # half an emoji, as in JSON, can't be drawn
            label = label if len(label) <= 14 * width else label[:int(14 * width)] + " ..."
            strip = make_grid(row.float().cpu(), nrow=len(row), padding=2, pad_value=1.0)
            axis.imshow(strip.permute(1, 2, 0).numpy(), interpolation="bicubic")
            axis.set_title(label, fontsize=9, loc="left", pad=3, parse_math=False)
            axis.axis("off")
            axis.set_anchor("W")


@torch.no_grad()
def save_reconstructions(path, vae, images, data, index):
    """Draw photographs of the data, above what the VAE makes of them."""
    x = get_images(images, index)
    save_grid(path, [x, vae(x, data["image_embeddings"][index], IMAGE)[0]], ["photographs", "reconstructions"])


@torch.no_grad()
def save_samples(path, models, images, data, index):
    """Draw photographs of the data, and below them eight samples for each of the first three's captions."""
    rows = [get_images(images, index)]
    for embedding in data["caption_embeddings"][index[:3], 0]:                          # (E,)
        torch.manual_seed(0)
        noise = torch.randn(8, *models["vae"].shape, device=index.device)
        rows.append(generate(models, embedding.expand(8, -1), TEXT, noise))
    save_grid(path, rows, ["photographs", *(data["captions"][number][0] for number in index[:3].tolist())])


def save_curves(path, history):
    """Draw how training and validation went, stage by stage."""
    stages = {stage: epochs for stage, (_, *epochs) in history.items() if epochs}  # the first: before the training
    if not stages:
        return
    with new_figure(path, 1, len(stages), (4.5 * len(stages), 3.5)) as axes:
        for axis, (stage, epochs) in zip(axes[0], stages.items()):
            x = [figures["epoch"] for figures in epochs]
            for key, label in {"train_loss": "training", "loss": "validation", "psnr": "PSNR, dB"}.items():
                if key in epochs[0] and (key != "psnr" or stage == "decoder"):
                    axis.plot(x, [figures[key] for figures in epochs], label=label)
            axis.set(xlabel="epoch", title=f"loss of the {stage}")
            axis.legend()


@torch.no_grad()
def save_prior_picture(path, models, images, data):
    """Draw latents of photographs, N(0, I) and the flow, along the two directions in which the first vary most."""
    index = indices(data, TRAIN)[:500]
    mu, sigma = (t[:, 0].float() for t in cache_latents(models["vae"], images, data, index))
    torch.manual_seed(0)
    noise = torch.randn_like(mu)
    clouds = {"latents of photographs": mu + sigma * torch.randn_like(mu), "draws from N(0, I)": noise}
    if models["prior"]:
        texts = data["caption_embeddings"][index, 0].split(64)
        clouds["draws from the flow"] = torch.cat([sample_flow(models["prior"], z, c, TEXT, guidance=1)[-1]
                                                   for z, c in zip(noise.split(64), texts)])
    points = torch.stack(list(clouds.values())).flatten(2).float().cpu()                # (3, 500, C G G)
    center = points[0].mean(0)
    _, _, directions = torch.linalg.svd(points[0] - center, full_matrices=False)        # principal directions
    seen = (points - center) @ directions[:2].T                                         # (3, 500, 2)
    limit = 1.1 * seen.abs().max().item()
    with new_figure(path, 1, len(clouds), (3.2 * len(clouds), 3.4)) as axes:
        for axis, name, cloud in zip(axes[0], clouds, seen):
            axis.scatter(*cloud.T.numpy(), s=3, alpha=0.5)
            axis.set(title=name, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")


# Downloads -----------------------------------------------------------------------------------------

ATTEMPTS, TIMEOUT = 4, 10  # tries per file; seconds without a byte before a connection counts as dead
COCO_URL = "http://images.cocodataset.org"  # plain http: its certificate does not match its name


def fetch(url, path, check, progress=None):
    """Download `url` to `path`, with retries. check(temporary path) raises ValueError for what was not wanted."""
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"{url!r} is not an http or https address; it was not opened.")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with atomic(path) as temporary:
                urllib.request.urlretrieve(url, temporary, progress)  # raises where bytes are missing
                check(temporary)
            return
        except (OSError, ValueError, http.client.HTTPException, zipfile.BadZipFile) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise UserError("The disk is full. What arrived is kept; make room and run this again.") from error
            if attempt == ATTEMPTS or getattr(error, "code", None) in (401, 403, 404, 410):  # it is gone
                raise OSError(f"{url}: {first_line(error)}") from error
        time.sleep(0.3 * 2**attempt)  # 0.6, 1.2, 2.4 s: a busy server is given time to recover


def fetch_annotations(path, base_url):
    """Fetch COCO's annotations archive and take out the captions file `path`, if it is not there yet."""
    if path.exists():
        return
    archive = path.with_name("annotations_trainval2017.zip")

    def take_out(temporary):  # one member, by its name: the archive's own names are never used as paths
        with zipfile.ZipFile(temporary) as bundle, atomic(path) as captions:
            captions.write_bytes(bundle.read(f"annotations/{path.name}"))

    def progress(blocks, size, total):
        bar.total = max(total, blocks * size)
        bar.update(blocks * size - bar.n)

    try:
        with tqdm(desc=archive.name, unit="B", unit_scale=True, leave=False) as bar:
            fetch(f"{base_url}/annotations/{archive.name}", archive, take_out, progress)
    except (OSError, KeyError) as error:  # KeyError: this archive lacks them
        raise UserError(f"COCO's captions could not be fetched ({first_line(error)}). Name a folder (--coco) or a "
                        "mirror (--mirror), or try the demo, which needs no network.") from error
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
        jobs = [pool.submit(fetch_one, p) for p in photographs if not is_there(folder, p)]
        for job in tqdm(jobs, "photographs", disable=not jobs):
            error = job.exception()
            if isinstance(error, UserError):
                raise error
            if error:
                failures.append(first_line(error))
            if len(failures) > max(10, 0.05 * len(photographs)):
                raise UserError(f"Too many photographs could not be fetched; what arrived is kept. {failures[-1]}")
    finally:  # also on Ctrl-C: what has not started never does
        pool.shutdown(cancel_futures=True)
    for failure in failures:
        print(f"skipped: {failure}")


# %% Appendix C. The commands --------------------------------------------------------------------------
# What `python cvae.py prepare`, `train`, `sample`, `evaluate` and `demo` do with all this, and their options.

def prepare(args):
    """Fetch what is missing, crop, embed with CLIP, and write one data file for all trainings."""
    words, root = args.words or THEMES[args.theme], Path(args.coco or "data/coco")
    must_be_writable(Path(args.data))
    device = choose_device(args.device)
    captions_path = root / f"annotations/captions_{args.split}.json"
    if not args.coco:
        fetch_annotations(captions_path, args.mirror)
    elif not captions_path.exists() and (root / captions_path.name).exists():
        captions_path = root / captions_path.name
    photographs = read_captions(captions_path, words)
    places = [root / args.split, root / "images" / args.split, root / "images", root][:4 if args.coco else 1]
    folder = next((place for place in places if any(is_there(place, p) for p in photographs)), places[0])
    model = load_clip(args.clip, device)  # before the long download: a mistake should show early
    if not args.coco:
        fetch_photographs(photographs, folder, args.mirror)
    on_disk = [p for p in photographs if is_there(folder, p)]
    if not on_disk:
        raise UserError(f"None of the {len(photographs)} photographs is in {' or '.join(map(str, places))}.")
    print(f"{len(photographs)} photographs match {', '.join(words) or 'every word'} in {captions_path}; "
          f"{len(on_disk)} are in {folder}, {len(photographs) - len(on_disk)} are missing.")
    kept, images, embeddings = embed_photographs(model, [folder / p["file_name"] for p in on_disk], device)
    kept = [on_disk[i] for i in kept]
    # a photograph with fewer than five captions repeats them, one with more keeps the first five
    captions = [[p["captions"][i % len(p["captions"])] for i in range(CAPTIONS)] for p in kept]
    texts = encode_texts(model, [caption for five in captions for caption in five]).cpu()  # (5N, E)
    split = split_data(images)
    fingerprint = hashlib.sha256(embeddings.numpy())  # reads the memory as it lies there, without a copy
    fingerprint.update(texts.numpy())
    save({"images": images, "image_embeddings": embeddings, "captions": captions, "split": split, "words": words,
          "caption_embeddings": texts.view(len(kept), CAPTIONS, -1), "ids": [p["id"] for p in kept],
          "fingerprint": fingerprint.hexdigest(), "clip": str(args.clip), "clip_fingerprint": clip_fingerprint(model)},
         args.data, "data file")
    learn, choose, judge = split.bincount().tolist()
    print(f"{args.data}: {learn} photographs to learn from, {choose} to choose by, {judge} to judge by.")


def train(args):
    """Train the stages on the data file; write a run folder with checkpoints and pictures."""
    device = choose_device(args.device)
    with several_processes(device):
        run = open_run(args, device)
        train_stages(run)
        if processes()[0] == 0:
            save_prior_picture(run.folder / "prior.png", run.models, run.images, run.data)
            *_, last = map(option, stages_of(run.config).values())
            print(f"{run.folder} is finished. To train it longer: --resume with a larger {last}.")


@torch.no_grad()
def sample(args):
    """Draw pictures for prompts (or from a photograph, or between two prompts); write a captioned grid."""
    device = choose_device(args.device)
    models, config = load_models(checkpoint_path(args.checkpoint), device)
    if args.prior == "normal":
        models["prior"] = None
    guidance, steps = flow_options(args, models)
    clip_model = load_clip(args.clip or config["clip"], device, config["clip_fingerprint"])
    requests = read_requests(args, clip_model, device)
    must_be_writable(Path(args.out) / "any name")
    rows, count = [], max(args.n, args.rerank)

    def noise(count):  # anew for each row: a prompt's row does not depend on its neighbours
        torch.manual_seed(args.seed)
        return torch.randn(count, *models["vae"].shape, device=device)

    if args.interpolate:  # one row, in which only the condition changes
        (first, a, _), (second, b, _) = requests
        requests = [(f"{first} → {second}", slerp(a[0], b[0], args.n), TEXT)]
    for _, target, modality in tqdm(requests, "sampling", leave=False):                  # target: (1 or n, E)
        if args.show_steps:
            trajectory = sample_flow(models["prior"], noise(1), target, modality, guidance, steps)
            shown = torch.linspace(0, steps, args.n).round().long().tolist()
            rows.append(torch.cat([models["vae"].decode(trajectory[step], target, modality) for step in shown]))
            continue
        start = noise(1).expand(count, -1, -1, -1) if args.interpolate else noise(count)
        pictures = generate(models, target.expand(count, -1), modality, start, guidance, steps)
        if args.rerank:
            pictures = pictures[(encode_images(clip_model, pictures) @ target[0]).topk(args.n).indices]
        rows.append(pictures)
    labels = [label for label, _, _ in requests]
    path = sample_path(args.out, " ".join(labels))
    save_grid(path, rows, labels)
    print(path)
    if args.separate:
        from torchvision.utils import save_image
        for number, picture in enumerate(torch.cat(rows), 1):
            own_path = sample_path(args.out, f"{path.stem}-{number:02}")
            with atomic(own_path) as temporary:
                save_image(picture, temporary)
            print(own_path)


@torch.no_grad()
def measure_samples(args, models, images, data, clip_model):
    """The four questions about test photographs, and about samples for a hundred of their captions: {row: figures}.

    And of the last row the pictures, how far each is from the nearest training photograph, and that one's number.
    """
    guidance, steps = flow_options(args, models)
    test, train = indices(data, TEST), indices(data, TRAIN)

    def embed(index):  # at the model's own size, or sharpness would be what sets photographs apart
        batches = tqdm(index.split(256), "photographs", leave=False)
        return torch.cat([encode_images(clip_model, get_images(images, batch)) for batch in batches])

    real, real_train = embed(test), embed(train)                                        # (M, E), (N, E)
    # a hundred captions, one of each photograph (its others would be right answers, too), of the five in turn
    fives = [data["captions"][number] for number in test.tolist()]
    captions = list(dict.fromkeys(five[place % CAPTIONS] for place, five in enumerate(fives)))[:100]  # no two alike
    texts = encode_texts(clip_model, captions)                                          # (100, E)
    # who has which of the hundred? in the toy world one caption may be that of many pictures
    asked = [(place, captions.index(caption)) for place, five in enumerate(fives)
             for caption in dict.fromkeys(five) if caption in captions]
    place, own = torch.tensor(asked, device=test.device).T
    # CMMD's memory grows with the square of a set's size: of those to learn from take as many as there are test ones
    table = {"photographs": compute_metrics(real, own, texts, real_train[:len(real)], real_train, asked=place)}
    own = torch.arange(len(texts), device=test.device).repeat_interleave(4)             # four of each caption
    for guidance in sorted({1.0, guidance}) if models["prior"] else [1.0]:
        torch.manual_seed(args.seed)
        noise = torch.randn(len(own), *models["vae"].shape, device=test.device)
        pictures = generate(models, texts[own], TEXT, noise, guidance, steps)
        drawn = encode_images(clip_model, pictures)
        table[f"samples, guidance {guidance:g}"] = compute_metrics(drawn, own, texts, real, real_train)
    distance, which = nearest_neighbour(drawn, real_train)
    return table, pictures, distance, train[which]


@torch.no_grad()
def evaluate(args):
    """Measure a run on test photographs; print a table, write it and two pictures into the run's folder."""
    device, path = choose_device(args.device), checkpoint_path(args.checkpoint)
    models, config = load_models(path, device)
    data = load_data(args.data or config["data"], device, config["fingerprint"])
    clip_model = load_clip(args.clip or config["clip"], device, config["clip_fingerprint"])
    images = pool_images(data["images"], config["size"])                                # uint8 (N, 3, S, S)
    table, pictures, distance, copied = measure_samples(args, models, images, data, clip_model)
    test, folder = indices(data, TEST), path.parent
    storage = measure_vae(models["vae"], images, data, test)
    print(f"{path}, {len(test)} test photographs: {storage['bpd']:.3f} bits/dim, KL {storage['kl']:.0f} nats, "
          f"PSNR {storage['psnr']:.1f} dB")
    print(" " * 24 + "".join(f"{column:>13}" for column in table["photographs"]))
    for name, row in table.items():
        print(f"{name:24}" + "".join(f"{value:13.3f}" for value in row.values()))
    with atomic(folder / "evaluation.json") as temporary:
        temporary.write_text(json.dumps({"checkpoint": str(path), **storage, "table": table}, indent=2))
    save_reconstructions(folder / "reconstructions.png", models["vae"], images, data, test[:8])
    suspects = distance.argsort()[:8]
    save_grid(folder / "nearest.png", [pictures[suspects], get_images(images, copied[suspects])],
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
    for line in ("prepare --coco data/toy --split toy --words sheep cow horse --clip data/toy/clip.pt "
                 "--data data/toy.pt",
                 # small networks serve a small world; no mirror images, because captions say left and right
                 f"train --data data/toy.pt --model small --epochs {args.epochs} --decoder-epochs {args.decoder_epochs}"
                 f" --prior-epochs {args.prior_epochs} --prior-width 128 --prior-lr 3e-3 --no-flip",
                 f"sample -n 4 {shlex.join(DEMO_PROMPTS)}", "evaluate"):
        print(f"\n$ python cvae.py {line}")
        step = parse_arguments(shlex.split(line))
        step.device = args.device
        step.function(step)


# Options -------------------------------------------------------------------------------------------

def between(convert, low, high):
    """An argparse type: an int or a float from low to high."""
    def number(text):  # argparse says "invalid number value: 'x'"
        value = convert(text)
        if not low <= value <= high:  # also refuses nan
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    return number


def text(argument):
    """An argparse type: where LC_ALL=C, the bytes of é may arrive undecoded."""
    return argument.encode(errors="surrogateescape").decode()


SEED, YES, ON_OFF = between(int, 0, 2**31 - 1), {"action": "store_true"}, {"action": argparse.BooleanOptionalAction}
EPOCHS, RATE, BATCH = ({"type": between(*limits)} for limits in ((int, 1, 100_000), (float, 1e-7, 1), (int, 1, 4096)))
SETTINGS = {  # of a training, as in CONFIG: what --help says, and how argparse reads them
    "data": ("data file to read", {"metavar": "FILE"}), "size": ("pixels", {"type": int, "choices": [64, 128]}),
    "latents": ("a grid of latents, or one vector as in the report", {"choices": ["grid", "flat"]}),
    "channels": ("numbers in each cell of the grid", {"type": between(int, 1, 64)}),
    "prior": ("learn p(z | c), or draw from N(0, I) as the report", {"choices": ["flow", "normal"]}),
    "objective": ("the ELBO, or the report's loss", {"choices": OBJECTIVES}),
    "dropout": ("on z; 0.3 if no P is given",
                {"nargs": "?", "type": between(float, 0, 0.9), "const": 0.3, "metavar": "P"}),
    "flip": ("mirror half of the pictures; off where captions say left and right", ON_OFF),
    "compile": ("torch.compile on CUDA", ON_OFF), "seed": ("of all randomness", {"type": SEED}),
    "vae_width": ("channels of the VAE at half of the side", {"type": int, "choices": [16, 32, 64, 96, 128]}),
    "epochs": ("of the VAE", EPOCHS), "batch": ("of the VAE", BATCH), "lr": ("peak learning rate of the VAE", RATE),
    "decoder_epochs": ("of the decoder's second lesson; 0 leaves it out", {"type": between(int, 0, 100_000)}),
    "decoder_batch": ("of the second lesson", BATCH), "decoder_lr": ("peak learning rate of the second lesson", RATE),
    "prior_width": ("of the prior's transformer", {"type": int, "choices": [64, 128, 192, 256, 384, 512, 768]}),
    "prior_depth": ("blocks of the prior's transformer", {"type": between(int, 1, 48)}),
    "prior_epochs": ("of the prior", EPOCHS), "prior_batch": ("of the prior", BATCH),
    "prior_lr": ("peak learning rate of the prior", RATE)}
DRAWING = {  # options of sample and of evaluate
    "--seed": ("same seed, same pictures", {"type": SEED, "default": 0}),
    "--guidance": (f"more than 1: surer, less varied; {GUIDANCE} if not given", {"type": between(float, 0, 20)}),
    "--steps": (f"of the flow; {STEPS} if not given", {"type": between(int, 1, 1000)}),
    "--checkpoint": ("checkpoint or run folder; the newest run if not given", {"metavar": "FILE"}),
    "--clip": ("the run's CLIP, if its file has moved", {})}
COMMANDS = {  # what each says of itself, and its options
    prepare: ("fetch COCO's matching photographs, crop and embed them: one data file", {
        "--split": ("split of COCO", {"default": "train2017"}),
        "--clip": ("CLIP's name, or a weights file", {"default": "ViT-B/32"}),
        "--data": ("data file to write", {"default": CONFIG["data"]})}),
    train: ("train the VAE, its decoder's second lesson and the prior on the data file", {
        "--model": ("sizes, rates and epochs; if not given, base for a CUDA card, else small", {"choices": MODELS}),
        "--precision": ("the fastest if not given", {"choices": ["float32", "bfloat16", "float16"]}),
        "--run": ("run folder; a new one in runs/ if not given", {"metavar": "DIR"}),
        "--resume": ("go on with --run or the newest; a larger --prior-epochs makes it longer: the learning rate goes "
                     "on as in a training of the new length", YES)}),
    sample: ("draw pictures for prompts", {
        "prompts": ("what to draw", {"nargs": "*", "type": text, "metavar": "PROMPT"}), **DRAWING,
        "-n": ("pictures per prompt", {"type": between(int, 1, 64), "default": 8}),
        "--prior": ("draw z from N(0, I), whatever was learned", {"choices": ["normal"]}),
        "--rerank": ("draw N per prompt and keep those that CLIP likes best",
                     {"type": between(int, 1, 4096), "default": 0, "metavar": "N"}),
        "--image": ("draw variations of a photograph", {"metavar": "FILE"}),
        "--interpolate": ("go from the first prompt to the second", YES),
        "--show-steps": ("one row per prompt: from noise to a picture", YES),
        "--separate": ("also write each picture as a PNG of its own", YES),
        "--out": ("folder to write to", {"default": "samples", "metavar": "DIR"})}),
    evaluate: ("measure a run on the test split of its data", {
        **DRAWING, "--data": ("the run's data file, if it has moved", {})}),
    demo: ("a toy world from drawing to sampling: no download, no GPU, a few minutes", {
        "--epochs": ("of the VAE; fewer: quicker, worse", {"default": 5, **EPOCHS}),
        "--decoder-epochs": ("of the second lesson", {"default": 1, **EPOCHS}),
        "--prior-epochs": ("of the prior", {"default": 26, **EPOCHS})})}


def parse_arguments(argv=None):
    """The command line as a namespace. Of train's settings those that are not given are None."""
    parser = argparse.ArgumentParser(description="Text to picture: a CLIP-conditioned VAE, a learned prior.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an expected error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for function, (purpose, options) in COMMANDS.items():
        command = commands.add_parser(function.__name__, help=purpose, description=purpose)
        command.set_defaults(function=function)
        command.add_argument("--device", choices=["cuda", "mps", "cpu"], help="the fastest there is if not given")
        for name, (help, details) in options.items():
            default = f" (default: {details['default']})" if details.get("default") is not None else ""
            command.add_argument(name, help=help + default, **details)
        if function is train:
            for name, (help, details) in SETTINGS.items():
                larger = f"; {MODELS['base'][name]} with --model base" if name in MODELS["base"] else ""
                command.add_argument(option(name), help=f"{help} (default: {CONFIG[name]}{larger})", **details)
        if function is prepare:
            which, where = command.add_mutually_exclusive_group(), command.add_mutually_exclusive_group()
            which.add_argument("--theme", choices=THEMES, default="bucolic", help="words (default: %(default)s)")
            which.add_argument("--words", nargs="+", type=text, metavar="WORD", help="words of your own")
            where.add_argument("--coco", metavar="DIR", help="a COCO folder on disk; nothing is fetched")
            where.add_argument("--mirror", metavar="URL", default=COCO_URL, help="to fetch from (default: %(default)s)")
    return parser.parse_args(argv)


def refuse_contradictions(args):
    """Options that make no sense together are refused, rather than one of them ignored."""
    given = {name for name, value in vars(args).items() if value}  # neither None nor zero, False, empty
    if args.function is sample:
        if not given & {"prompts", "image"}:
            raise UserError('Say what to draw: python cvae.py sample "sheep on a hill", or --image FILE.')
        if args.interpolate and (len(args.prompts) != 2 or given & {"image", "show_steps"}):
            raise UserError("--interpolate goes between exactly two prompts, without --image or --show-steps.")
        if args.n == 1 and given & {"interpolate", "show_steps"}:
            raise UserError("--interpolate and --show-steps go from one picture to another: -n 2 or more.")
        if args.rerank and (given & {"interpolate", "show_steps"} or args.rerank < args.n):
            raise UserError("--rerank N, at least as large as -n, goes without --interpolate and --show-steps.")
    if args.function is prepare and UNSAFE_NAME.search(args.split):
        raise UserError(f"--split {args.split} is not a plain name.")
    if args.function is train and args.latents == "flat" and args.channels:
        raise UserError("--channels is for a grid of latents, and --latents flat has none.")
    if args.function is train and not args.resume and args.prior == "normal":
        for name in given & {"prior_epochs", "prior_batch", "prior_lr", "prior_width", "prior_depth"}:
            raise UserError(f"{option(name)} says how to train a flow, and --prior normal wants none.")


def main(argv=None):
    """Run one command; an expected failure becomes one sentence and exit status 1."""
    for stream in sys.stdout, sys.stderr:  # what a console can't show is replaced; a notebook's shows all
        getattr(stream, "reconfigure", dict)(errors="replace")
    args = parse_arguments(argv)
    socket.setdefaulttimeout(TIMEOUT)  # for every download, clip's own among them
    try:
        refuse_contradictions(args)
        args.function(args)
    except (UserError, KeyboardInterrupt, OSError, ImportError, RuntimeError) as error:
        if args.debug:
            raise
        message = str(error)
        if isinstance(error, RuntimeError):  # a full memory is one, on CUDA, a Mac and a processor; others are our faults
            if not re.search("out of memory|can't allocate memory", message):
                raise
            message = "The memory is full; try half of --batch, --decoder-batch and --prior-batch, or of -n."
        elif isinstance(error, KeyboardInterrupt):
            message = message or "Interrupted. What was finished is kept; the same command goes on (train: --resume)."
        elif isinstance(error, ImportError) and "clip" in str(error.name):  # two packages have this name
            message += (". OpenAI's CLIP is in the package clip-anytorch, not in clip: pip uninstall -y clip; "
                        "pip install --force-reinstall --no-deps clip-anytorch==2.6.0")
        sys.exit(f"\n{message}")


if __name__ == "__main__" and "ipykernel" not in sys.modules:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's word counts as Ctrl-C
    main()  # in a notebook, call it yourself: main(["sample", "sheep on a hill"])
