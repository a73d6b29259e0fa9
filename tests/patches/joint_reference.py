"""Attention of layers in transformers written out in float64 as one matrix over all tokens of the whole batch, with
masks, put into a copy of the host's own network.
"""

import copy
import math

import torch

from .fusion_reference import level_between, minmax

MULTIPLE = {"Z-Image": 8}  # of small_transformers


def expected(model, args, attention):
    """What the model gives for a call's arguments when `attention` does its attention."""
    exact = copy.deepcopy(model.model)
    exact.diffusion_model.double()
    exact.diffusion_model.dtype, exact.manual_cast_dtype = torch.float64, None
    given = {name: value for name, value in args["c"].items() if name not in ("transformer_options", "control")}
    options = {"optimized_attention_override": attention}
    if attention.texts:
        network = exact.diffusion_model
        network.cap_embedder = Filled(network.cap_embedder, network.cap_pad_token, attention.lengths)
    with torch.no_grad():
        return exact.apply_model(args["input"], args["timestep"], **given, transformer_options=options)


class Filled(torch.nn.Module):
    """Z-Image's prompts with its own token from each one's end on."""

    def __init__(self, embedder, token, lengths):
        super().__init__()
        self.embedder, self.token, self.lengths = embedder, token, lengths

    def forward(self, tokens):
        place = torch.arange(tokens.shape[1])[None, :, None]
        return torch.where(place < torch.tensor(self.lengths)[:, None, None], self.embedder(tokens), self.token[None])


class Attention:
    """lengths: of each row's prompt, in sequences of `text` tokens; size: rows and columns of the image's tokens."""

    def __init__(self, kind, lengths, text, size, blocks):
        self.lengths, self.size, self.blocks, self.number = lengths, size, blocks, -1
        fill = MULTIPLE.get(kind, 1)
        self.start, self.places = math.ceil(text / fill) * fill, size[0] * size[1]
        self.total, self.text = self.start + math.ceil(self.places / fill) * fill, text
        self.texts = fill > 1  # the first attention is of the prompt alone
        self.own = [math.ceil(length / fill) * fill for length in lengths]  # filled up as alone

    def __call__(self, func, q, k, v, heads, *args, **kwargs):
        if not kwargs.get("skip_reshape"):
            q, k, v = (one.reshape(*one.shape[:2], heads, -1).transpose(1, 2) for one in (q, k, v))
        if q.shape[2] == self.total:
            self.number += 1
            found = self.joint(q, k, v)
        else:
            own = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool)
            if self.texts:
                own, self.texts = self.valid()[:, : self.start], False
            found = torch.stack([attend(q[i], k[i], v[i], own[i]) for i in range(len(q))])
        return found.transpose(1, 2).flatten(2)

    def valid(self):
        """[B,T]: all but what fills up the shorter prompts."""
        place = torch.arange(self.total)
        return torch.stack([(place < length) | (place >= self.start) for length in self.own])

    def image(self):
        place = torch.arange(self.total)
        return (place >= self.start) & (place < self.start + self.places)

    def read(self, q, k, v, mixed, sees, prompts):
        """Each row's image tokens see the images of the rows in `sees` and what is beside the image of row `prompts`;
        the others their own row. mixed: q, k and v of the whole sequences for the images' reading.
        """
        image, valid, found = self.image(), self.valid(), []
        rows = len(q)
        for row in range(rows):
            plain = attend(q[row], k[row], v[row], valid[row])
            keys = torch.stack([(beside & ~image) & (row_of == prompts[row]) for row_of, beside in enumerate(valid)])
            images = torch.stack([image & torch.tensor(other in sees[row]) for other in range(rows)])
            joined = []
            for values, other in ((k, mixed[1]), (v, mixed[2])):
                values = torch.where(image[None, None, :, None], other, values)
                joined.append(values.transpose(0, 1).flatten(1, 2))
            shared = attend(mixed[0][row], *joined, (keys | images).flatten())
            found.append(torch.where(image[None, :, None], shared, plain))
        return torch.stack(found)

    def probabilities(self, q, k, row):
        """[H,T,T] of one row."""
        logits = q[row] @ k[row].mT / math.sqrt(q.shape[-1])
        return torch.softmax(logits.masked_fill(~self.valid()[row], -math.inf), -1)


def attend(q, k, v, seen):
    """q [H,M,D], k and v [H,S,D], seen [S]."""
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    return torch.softmax(logits.masked_fill(~seen, -math.inf), -1) @ v


class Layers(Attention):
    """DreamLayer. words: the objects' places in the whole picture's prompt; maps_of: the rows whose maps count, the
    whole pictures of the conditional estimate, one a scene of `count` rows.
    """

    def __init__(self, *args, count, sharing=1.0, mixing=0.0, words=(), maps_of=(), maps=None, isolated=False):
        super().__init__(*args)
        self.count, self.sharing, self.mixing, self.words = count, sharing, mixing, words
        self.maps_of, self.maps, self.shares, self.isolated = maps_of, maps, [], isolated
        double, single = (*self.blocks, 0)[:2]
        self.mapped = range(double // 3, 2 * double // 3)
        self.later = range(max((double + single) // 2, self.mapped.stop), double + single)

    def joint(self, q, k, v):
        rows, image = len(q), self.image()
        if self.number in self.mapped and len(self.maps_of):
            parts = [self.probabilities(q, k, row).mean(0)[image] for row in self.maps_of]
            self.shares.append(
                torch.stack([torch.stack([part[:, own].sum(-1) for own in self.words]) for part in parts])
            )
            if self.number == self.mapped[-1]:
                shares = sum(self.shares)
                self.maps = torch.stack([minmax(one) for one in shares])
        alone = [[row] for row in range(rows)]
        if self.number not in self.later:
            return self.read(q, k, v, (q, k, v), alone, range(rows))
        mixed = [one.clone() for one in (q, k, v)]
        if self.mixing:
            for row in range(rows):
                scene, layer = divmod(row, self.count)
                if 0 < layer < self.count - 1:
                    weight = self.maps[scene % len(self.maps)][layer - 1][None, :, None] * self.mixing
                    whole = row + self.count - 1 - layer
                    for new, old in zip(mixed, (q, k, v), strict=True):
                        new[row][:, image] = old[row][:, image] * (1 - weight) + old[whole][:, image] * weight
        scenes = [range(row - row % self.count, row - row % self.count + self.count) for row in range(rows)]
        if self.isolated:
            scenes = [own if row % self.count < self.count - 1 else [row] for row, own in enumerate(scenes)]
        apart = self.read(q, k, v, mixed, alone, range(rows))
        shared = self.read(q, k, v, mixed, scenes, range(rows))
        return apart * (1 - self.sharing) + shared * self.sharing


class Blending(Attention):
    """LayerFusion. ends: the places of the foreground's prompt that the content prior is taken from. prior: the rows
    are foregrounds alone, which give the structure; otherwise it is given. masks: those of the conditional estimate,
    made where None is given. parts: the thirds of the network that blend.
    """

    def __init__(self, *args, ends, prior=False, structure=None, masks=None, parts=(0, 1, 2), **settings):
        super().__init__(*args)
        self.ends, self.prior, self.structure, self.parts = ends, prior, structure, parts
        self.made, self.masks = masks is None, masks or {}
        self.settings = {"boundary": 10.0, "own_prompt": False, "wide": False, "strength": 1.0, **settings}

    def joint(self, q, k, v):
        rows, image, count = len(q), self.image(), sum(self.blocks)
        alone = [[row] for row in range(rows)], range(rows)
        apart = self.read(q, k, v, (q, k, v), *alone)
        if self.prior:
            if self.number == count - 1:
                m = torch.softmax(q[:, :, image] @ k[:, :, image].mT / math.sqrt(q.shape[-1]), -1).mean(1)
                self.structure = 1 - minmax(1 / m.square().sum(-1))
            return apart
        if 3 * self.number // count not in self.parts:
            return apart
        if self.made:
            content = torch.stack(
                [self.probabilities(q, k, row).mean(0)[image][:, self.ends].sum(-1) for row in range(0, rows, 3)]
            )
            soft = minmax(self.structure * content)
            hard, wide = (
                1 / (1 + torch.exp(-self.settings["boundary"] * (soft - middle)))
                for middle in (0.5, level_between(soft))
            )
            self.masks[self.number] = soft, hard, wide
        sees = [[row] if row % 3 == 0 else [row - row % 3 + 1, row - row % 3 + 2] for row in range(rows)]
        prompts = [row - 1 if row % 3 == 2 and not self.settings["own_prompt"] else row for row in range(rows)]
        strength = self.settings["strength"]
        out = apart * (1 - strength) + self.read(q, k, v, (q, k, v), sees, prompts) * strength
        foreground, blended = (out[layer::3][:, :, image] for layer in (0, 2))
        soft, hard, wide = (mask[:, None, :, None] * strength for mask in self.masks[self.number])
        mixed = foreground * soft + blended * (1 - soft)
        entered = foreground * wide + blended * (1 - wide) if self.settings["wide"] else mixed
        out = out.clone()
        out[0::3, :, image] = mixed * hard + foreground * (1 - hard)
        out[2::3, :, image] = entered
        return out
