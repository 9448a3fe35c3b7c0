"""The three stages of EasyRef on the storybook's frozen denoiser, and the rivals' poolings.

"alignment": a target is reconstructed from itself, and the final layer, the projector and the
adapter learn. "single": the same with the whole MLLM. "multi": the target is held out of its
group; the others are shuffled, at most MAX_REFERENCES are read; a share of the samples asks for
attributes of several things, and another has an outlier among the references.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from customize.families import family_of
from customize.references.adapter import ReferenceAdapter
from customize.references.encoder import ReferenceEncoder
from customize.references.encoder_inputs import GroupRequest, ReferenceProcessor
from customize.references.model import ReferenceModel
from customize.references.seams.unet import attached, attention_layers
from customize.storybook.judges import Judges
from storybook_training.contact_sheet import save_contact_sheet
from storybook_training.pretrain_base import train_loop
from storybook_training.training_files import log_row, save_tensors

from . import mllm
from .attribute_groups import AttributeGroups
from .captions import class_caption
from .questions import groups_by_class
from .render_groups import IMAGES, Groups, patches

MAX_REFERENCES = 7
DROP = 0.05
MIN_SNR_GAMMA = 5.0
GRID = torch.tensor([[1, 8, 8]])
BLACK = np.zeros((64, 64, 3), np.uint8)

#: How the tokens of several images become one condition.
POOLINGS = ("group", "average", "concatenate", "one")


@dataclass(frozen=True, eq=False)
class Data:
    """Drawn groups with the latents of all images, and targets of attributes with theirs."""

    groups: Groups
    latents: np.ndarray[Any, Any]
    attributes: AttributeGroups
    attribute_latents: np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Sample:
    """A target's latents (4, 16, 16), its caption, its references and their attributes."""

    latents: np.ndarray[Any, Any]
    caption: str
    references: Sequence[np.ndarray[Any, Any]]
    attributes: Sequence[str]


class Model(nn.Module):
    """Encoder and adapter in training.

    Args:
        pipe: The storybook's pipeline.
        mllm_weights: Pretrained weights of the MLLM; None: random ones.
        pooling: One of :data:`POOLINGS`; all but "group" read each image by itself.
    """

    def __init__(self, pipe: Any, mllm_weights: Path | None, pooling: str = "group") -> None:
        super().__init__()
        self.family = family_of(pipe.components)
        self.processor: ReferenceProcessor = mllm.make_processor()
        torch.manual_seed(1)
        trained = mllm.make_mllm(len(self.processor.tokenizer))
        if mllm_weights is not None:
            trained.load_state_dict(load_file(mllm_weights))
        self.encoder = ReferenceEncoder(mllm.CONFIG, trained)
        config = mllm.CONFIG
        layers = attention_layers(self.family)
        self.adapter = ReferenceAdapter(layers, config.width, config.lora_rank, config.lora_alpha)
        self.adapter.copy_text_projections(pipe.unet)
        self.pooling = pooling
        self.attachment: Any = None  # while a stage is trained
        self._texts: dict[str, Tensor] = {}

    def continue_from(self, trained: ReferenceModel) -> None:
        """Copy the weights of a trained reference model."""
        self.encoder.load_state_dict(trained.encoder.state_dict())
        self.adapter.load_state_dict(trained.adapter.state_dict())

    def encode(
        self,
        references: Sequence[Sequence[np.ndarray[Any, Any]]],
        attributes: Sequence[Sequence[str]] | None = None,
    ) -> Tensor:
        """Encode groups of images (64, 64, 3), uint8, to tokens (groups, tokens, width)."""
        attributes = attributes or [[""] * len(images) for images in references]
        if self.pooling == "group":
            return self._encode(references, attributes)
        if self.pooling == "one":
            return self._encode([r[:1] for r in references], [a[:1] for a in attributes])
        flat = [[image] for images in references for image in images]
        names = [[name] for row in attributes for name in row]
        rows = self._encode(flat, names).split([len(images) for images in references])
        if self.pooling == "average":
            return torch.stack([tokens.mean(0) for tokens in rows])
        return torch.stack([tokens.flatten(0, 1) for tokens in rows])

    def _encode(self, references: Any, attributes: Any) -> Tensor:
        requests = [
            GroupRequest(images, names)
            for images, names in zip(references, attributes, strict=True)
        ]
        pixels = patches(np.stack([image for images in references for image in images]))
        grids = GRID.expand(len(pixels) // 64, -1)
        return self.encoder(self.processor.assemble(requests, pixels, grids, self.encoder.config))

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """Encoded captions (captions, tokens, width), kept."""
        for caption in captions:
            if caption not in self._texts:
                self._texts[caption] = self.family.encode_prompts([caption])["prompt_embeds"][0]
        return torch.stack([self._texts[caption] for caption in captions])


def make_sample(
    data: Data, members: Mapping[str, list[int]], stage: str, count: int, rng: np.random.Generator
) -> Sample:
    """Draw a sample.

    Args:
        data: The groups.
        members: Class -> its groups.
        stage: "alignment", "single" or "multi".
        count: Largest number of references of a sample without attributes.
        rng: Random number generator.
    """
    groups = data.groups
    if stage == "multi" and rng.random() < 0.25:
        number = int(rng.integers(len(data.attributes.captions)))
        names = data.attributes.attributes[number]
        images = data.attributes.pixels[number]
        sources = [images[1 + k] for k in range(len(names))]
        caption = data.attributes.captions[number]
        return Sample(data.attribute_latents[number, 0], caption, sources, names)
    group, target = int(rng.integers(len(groups.identities))), int(rng.integers(IMAGES))
    kind = groups.identities[group].kind
    background = groups.backgrounds[group][target] if rng.random() < 0.9 else None
    caption = class_caption(kind, groups.accessories[group][target], background)
    if stage == "multi":
        others = [k for k in rng.permutation(IMAGES) if k != target][:count]
        references = [groups.pixels[group, k] for k in others]
        if len(references) > 2 and rng.random() < 0.15:  # an outlier of the class
            outlier = int(members[kind][int(rng.integers(len(members[kind])))])
            place = int(rng.integers(len(references)))
            if outlier != group:  # whose image would be the target
                references[place] = groups.pixels[outlier, target]
    else:
        references = [groups.pixels[group, target]]
    return Sample(data.latents[group, target], caption, references, [""] * len(references))


def drop_conditions(sample: Sample, rng: np.random.Generator) -> Sample:
    """Replace the references by a black image, the caption by nothing, or both, 5 % each."""
    draw = rng.random()
    references, attributes, caption = sample.references, sample.attributes, sample.caption
    if draw < 2 * DROP:
        references, attributes = [BLACK], [""]
    if DROP <= draw < 3 * DROP:
        caption = ""
    return Sample(sample.latents, caption, references, attributes)


def train_stage(
    stage: str,
    folder: Path,
    model: Model,
    data: Data,
    unet: Any,
    steps: int,
    batch: int,
    lr: float,
    on_checkpoint: Callable[[int], None],
    seed: int = 0,
) -> None:
    """Train one stage, or resume it; leaves the averaged weights in the model."""
    members = groups_by_class(data.groups)
    encoder = model.encoder
    modules: dict[str, nn.Module] = {
        "final": encoder.final_layer,
        "projector": encoder.projector,
        "adapter": model.adapter,
    }
    if stage != "alignment":
        modules["mllm"] = encoder.mllm
    encoder.mllm.requires_grad_(stage != "alignment")
    family = model.family

    def loss_of(generator: torch.Generator) -> Tensor:
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        # One number of references a batch where tokens are concatenated, which cannot be padded.
        shared = _draw_count(rng) if model.pooling == "concatenate" else 0
        samples = []
        for _ in range(batch):
            count = shared or _draw_count(rng)
            sample = make_sample(data, members, stage, count, rng)
            samples.append(drop_conditions(sample, rng))
        if model.pooling == "concatenate":
            samples = [_repeat(sample, shared) for sample in samples]
        latents = torch.tensor(np.stack([sample.latents for sample in samples])).float()
        tokens = model.encode(
            [sample.references for sample in samples], [sample.attributes for sample in samples]
        )
        noise = torch.randn(latents.shape, generator=generator)
        u = torch.rand(batch, generator=generator).clamp(1e-5, 1 - 1e-5)
        t = family.timesteps(u, latents.shape[1:])
        noisy = family.noisy_latents(latents, noise, t)
        conditions = {"prompt_embeds": model.texts([sample.caption for sample in samples])}
        with model.attachment.condition(tokens):
            predicted = family.predict(noisy, t, conditions)
        error = (predicted.float() - family.target(latents, noise, t)).square().mean((1, 2, 3))
        return (family.loss_weight(t, MIN_SNR_GAMMA) * error).mean()

    with attached(unet, model.adapter) as model.attachment:
        train_loop(stage, folder, modules, loss_of, steps, lr, seed, on_checkpoint)
    model.attachment = None


def _draw_count(rng: np.random.Generator) -> int:
    """A number of references from 1 to MAX_REFERENCES, small ones more often: they cost less."""
    return 1 + int(MAX_REFERENCES * float(rng.random()) ** 2)


def _repeat(sample: Sample, count: int) -> Sample:
    """Repeat or cut the references of a sample to a number."""
    indices = [k % len(sample.references) for k in range(count)]
    return Sample(
        sample.latents,
        sample.caption,
        [sample.references[k] for k in indices],
        [sample.attributes[k] for k in indices],
    )


def save_model(model: Model, path: Path) -> None:
    """Write encoder and adapter, float32."""
    tensors = {f"encoder.{k}": v for k, v in model.encoder.state_dict().items()}
    tensors |= {f"adapter.{k}": v for k, v in model.adapter.state_dict().items()}
    save_tensors(path, tensors)


@torch.no_grad()
def draw(
    model: Model,
    pipe: Any,
    prompts: Sequence[str],
    tokens: Tensor,
    seeds: Sequence[int],
    steps: int = 25,
    guidance: float = 2.5,
) -> Tensor:
    """Draw prompts with tokens (prompts, tokens, width) -> (prompts, 3, 64, 64) in [-1, 1]."""
    empty = model.encode([[BLACK]])
    repeats = tokens.shape[1] // empty.shape[1]
    negative = empty.repeat(1, repeats, 1).expand(len(tokens), -1, -1)
    both = torch.cat([negative, tokens])
    with ExitStack() as stack:
        attachment = model.attachment
        if attachment is None:
            attachment = stack.enter_context(attached(pipe.unet, model.adapter))
        stack.enter_context(attachment.condition(both))
        images = pipe(
            list(prompts),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
        ).images
    return images.float() * 2 - 1


@torch.no_grad()
def evaluate(
    model: Model,
    pipe: Any,
    judges: Judges,
    groups: Groups,
    path: Path,
    count: int = 8,
    references: int = 4,
) -> dict[str, float]:
    """Draw two scenes for each of some held-out groups; write a sheet; return the rates."""
    from customize.evaluation.storybook_rates import SCENES, attribute_hits, parse_prompt
    from customize.image_tensors import images_to_tensor

    model.eval()
    from PIL import Image

    prompts, tokens, prototypes, rows = [], [], [], []
    for group in range(count):
        shown = [groups.pixels[group, k] for k in range(references)]
        kind = groups.identities[group].kind
        all_images = images_to_tensor([Image.fromarray(image) for image in groups.pixels[group]])
        prototypes.append(judges.prototype(all_images))
        for scene in (SCENES[group % 8], SCENES[(group + 3) % 8]):
            prompts.append(class_caption(kind, scene[1], scene[0]))
            tokens.append(model.encode([shown])[0])
        rows.append(all_images[:references])
    seeds = range(len(prompts))
    images = draw(model, pipe, prompts, torch.stack(tokens), seeds)
    hits: list[bool] = []
    distances = []
    for number, (prompt, seen) in enumerate(
        zip(prompts, judges.predict_attributes(images), strict=True)
    ):
        kind = groups.identities[number // 2].kind
        hits += attribute_hits(seen, parse_prompt(prompt), [kind])
        distances.append(judges.distance(images[[number]], prototypes[number // 2]))
    distance = torch.cat(distances)
    sheet = torch.cat([torch.cat([row, images[2 * k : 2 * k + 2]]) for k, row in enumerate(rows)])
    save_contact_sheet(sheet, path, references + 2)
    model.train()
    return {
        "identity": float((distance <= judges.threshold).float().mean()),
        "distance": float(distance.mean()),
        "prompt": sum(hits) / len(hits),
    }


def train_stages(
    folder: Path,
    pipe: Any,
    judges: Judges,
    model: Model,
    data: Data,
    held_out: Groups,
    stages: Mapping[str, int],
    batch: int = 24,
    lr: float = 1e-3,
) -> None:
    """Train all stages, or resume, and write ``references.safetensors`` of the pooling's folder."""
    pipe.unet.requires_grad_(False)
    results = folder / model.pooling
    results.mkdir(exist_ok=True)
    for stage, steps in stages.items():
        done = results / f"after-{stage}.safetensors"
        if done.exists():
            load_model(model, done)
            continue

        def on_checkpoint(step: int, stage: str = stage) -> None:
            save_model(model, results / "references.safetensors")
            sheet = results / f"{stage}-{step}.png"
            rates = evaluate(model, pipe, judges, held_out, sheet)
            log_row(results, stage=f"{stage} rates", step=step, **rates)

        train_stage(stage, results, model, data, pipe.unet, steps, batch, lr, on_checkpoint)
        save_model(model, done)
    save_model(model, results / "references.safetensors")
    model.eval()


def load_model(model: Model, path: Path) -> None:
    """Load what :func:`save_model` wrote."""
    tensors = load_file(path)
    for part in ("encoder", "adapter"):
        prefix = f"{part}."
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        getattr(model, part).load_state_dict(state)
