"""The heart: what a roll-out visits, what it teaches, and who is selected when."""

from types import SimpleNamespace

import pytest
import torch

from dopsd.config.groups import LoraSettings
from dopsd.distill.adapters import add_adapters
from dopsd.distill.baselines import flow_matching, off_policy
from dopsd.distill.rollout import rollout, sample
from tests import tiny

STEPS = 3


def _setting(family, dtype=torch.float32, kind="ema"):
    """A pair of adapters that differ, noise, grid, prompts and contexts of two examples."""
    if dtype != family.dtype:
        family.transformer.to(dtype)
    pair = tiny.trained_pair(family, size=0.2, kind=kind, dtype=dtype)
    examples = tiny.tiny_examples(2)
    noise = family.initial_latents(2, tiny.SIDE, tiny.SIDE, torch.Generator().manual_seed(0)).to(dtype)
    sigmas = family.sigmas(STEPS, tiny.SIDE, tiny.SIDE).to(dtype)
    return pair, noise, sigmas, [e.prompt for e in examples], [e.context for e in examples]


def _double(family):
    """``predict_velocity`` without its rounding to float32."""

    def predict(latents, sigma, conditioning):
        t = (1 - sigma.double()).expand(len(latents))
        states = [c["caption"].double() for c in conditioning]
        output = family.transformer(list(latents.unsqueeze(2).unbind(0)), t, states, return_dict=False)[0]
        return -torch.stack(output).squeeze(2)

    return predict


def _gradients(pair):
    found = [p.grad.clone() for p in pair.student_parameters()]
    for parameter in pair.student_parameters():
        parameter.grad = None
    return found


@pytest.mark.parametrize("loss", ["velocity", "x0"])
def test_the_sum_of_per_step_gradients_is_the_gradient_of_the_whole_loss(family, loss):
    """Against the method written plainly: all K graphs kept, one backward at the end, in float64."""
    pair, noise, sigmas, prompts, contexts = _setting(family, torch.float64)
    predict = _double(family)
    weighted = {"weight": 0.7} if loss == "x0" else {}
    end, value = rollout(predict, pair, noise, sigmas, prompts, contexts, teacher="teacher", loss=loss, **weighted)
    per_step = _gradients(pair)

    x, total = noise, torch.zeros((), dtype=torch.float64)
    for k in range(STEPS):
        with torch.no_grad(), pair.select("teacher"):
            u_t = predict(x, sigmas[k], contexts)
        u_s = predict(x, sigmas[k], prompts)
        w = sigmas[k] ** 2 if loss == "x0" else 1.0
        total = total + w * torch.nn.functional.mse_loss(u_s, u_t) / STEPS
        x = (x + (sigmas[k + 1] - sigmas[k]) * u_s).detach()
    (weighted.get("weight", 1) * total).backward()
    whole = _gradients(pair)

    assert max(g.abs().max() for g in whole) > 1e-6
    for a, b in zip(per_step, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(value.double(), total.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(end, x)


def test_a_rollout_ends_where_plain_euler_and_the_pipeline_itself_end(family):
    from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline

    pair, noise, sigmas, prompts, contexts = _setting(family)
    end, _ = rollout(family.predict_velocity, pair, noise, sigmas, prompts, contexts, teacher="teacher")
    x = noise
    with torch.no_grad():
        for k in range(STEPS):
            x = x + (sigmas[k + 1] - sigmas[k]) * family.predict_velocity(x, sigmas[k], prompts)
    sampled = sample(family, prompts, STEPS, tiny.SIDE, tiny.SIDE, noise)
    pipeline = ZImagePipeline(
        vae=family.parts["vae_decoder"],
        **{name: family.parts[name] for name in ("scheduler", "text_encoder", "tokenizer", "transformer")},
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    truth = pipeline(
        prompt_embeds=[p["caption"] for p in prompts], guidance_scale=0.0, num_inference_steps=STEPS, latents=noise,
        height=tiny.SIDE, width=tiny.SIDE, output_type="latent",
    ).images  # fmt: skip
    assert torch.equal(end, x)
    assert torch.equal(sampled, x)
    # the pipeline rounds its timesteps 1000 * sigma to float32 on the way to the same t
    torch.testing.assert_close(truth, x, rtol=1e-4, atol=1e-4)
    with_context = sample(family, contexts, STEPS, tiny.SIDE, tiny.SIDE, noise)
    assert (with_context - x).abs().mean() > 1e-2


def test_sampling_needs_noise_or_a_generator_and_repeats_with_the_same_seed(family):
    prompts = tiny.tiny_prompts(2)
    first, again = (sample(family, prompts, 2, 64, 64, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert not first.requires_grad
    with pytest.raises(TypeError, match="noise or a generator"):
        sample(family, prompts, 2, 64, 64)


def test_each_step_is_taught_and_back_propagated_before_the_next(family):
    """Teacher without gradient, then student, then backward: one graph is alive at a time."""
    pair, noise, sigmas, prompts, contexts = _setting(family)
    events = []

    def predict(latents, sigma, conditioning):
        assert not latents.requires_grad
        who = "contexts" if conditioning is contexts else "prompts"
        events.append((pair.selected, who, torch.is_grad_enabled()))
        return family.predict_velocity(latents, sigma, conditioning)

    def backward(loss):
        events.append("backward")
        loss.backward()

    rollout(predict, pair, noise, sigmas, prompts, contexts, teacher="teacher", backward=backward)
    assert events == [("teacher", "contexts", False), ("student", "prompts", True), "backward"] * STEPS


@pytest.mark.parametrize("kind", ["ema", "frozen", "copy"])
def test_gradient_checkpointing_recomputes_under_the_student(family, kind):
    pair, noise, sigmas, prompts, contexts = _setting(family, kind=kind)
    run = {"teacher": pair.teacher, "guidance": 1.5}
    rollout(family.predict_velocity, pair, noise, sigmas, prompts, contexts, **run)
    plain = _gradients(pair)
    forwards = []
    family.transformer.layers[0].register_forward_pre_hook(
        lambda *_: forwards.append((pair.selected, torch.is_grad_enabled()))
    )
    family.transformer.enable_gradient_checkpointing()
    rollout(family.predict_velocity, pair, noise, sigmas, prompts, contexts, **run)
    # teacher, teacher without context, student, and the student again inside backward
    teacher = [(pair.teacher, False)] * 2
    assert forwards == [*teacher, ("student", True), ("student", True)] * STEPS
    for a, b in zip(_gradients(pair), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_the_teacher_never_gets_a_gradient_and_only_the_student_does(family):
    pair, noise, sigmas, prompts, contexts = _setting(family)
    rollout(family.predict_velocity, pair, noise, sigmas, prompts, contexts, teacher="teacher", guidance=2.0)
    with_gradient = {name for name, p in family.transformer.named_parameters() if p.grad is not None}
    assert with_gradient
    assert all(".student." in name for name in with_gradient)
    assert len(with_gradient) == len(pair.student_parameters())


def test_guidance_pushes_the_target_along_what_the_context_changes(family):
    pair, noise, sigmas, prompts, contexts = _setting(family)
    sigmas = sigmas[-2:]  # one step
    with torch.no_grad():
        with pair.select("teacher"):
            u_t, u_0 = (family.predict_velocity(noise, sigmas[0], c) for c in (contexts, prompts))
        u_s = family.predict_velocity(noise, sigmas[0], prompts)
    for g in (1.0, 2.5):
        _, loss = rollout(
            family.predict_velocity, pair, noise, sigmas, prompts, contexts, teacher="teacher", guidance=g
        )
        expected = torch.nn.functional.mse_loss(u_s, u_0 + g * (u_t - u_0))
        torch.testing.assert_close(loss, expected)


def test_a_student_that_is_its_teacher_learns_nothing_from_the_same_prompt(family):
    """Replay's zero: the base against itself, text only."""
    pair = add_adapters(family.transformer, LoraSettings(rank=4), family.lora_targets, 0)
    noise = family.initial_latents(1, 64, 64, torch.Generator().manual_seed(0))
    prompts = tiny.tiny_prompts(1)
    _, loss = rollout(family.predict_velocity, pair, noise, family.sigmas(2, 64, 64), prompts, prompts, teacher=None)
    assert loss == 0


def test_off_policy_is_the_same_loss_at_noised_targets(family):
    pair, noise, sigmas, prompts, contexts = _setting(family)
    latents = torch.stack([e.latents for e in tiny.tiny_examples(2)])
    value = off_policy(family.predict_velocity, pair, latents, noise, sigmas, prompts, contexts, teacher="teacher")
    gradients = _gradients(pair)
    total = torch.zeros(())
    for sigma in sigmas[:-1]:
        x = (1 - sigma) * latents + sigma * noise
        with torch.no_grad(), pair.select("teacher"):
            u_t = family.predict_velocity(x, sigma, contexts)
        total = total + torch.nn.functional.mse_loss(family.predict_velocity(x, sigma, prompts), u_t) / STEPS
    total.backward()
    torch.testing.assert_close(value, total.detach())
    for a, b in zip(gradients, _gradients(pair), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


def test_flow_matching_regresses_noise_minus_target_at_each_examples_own_level(family):
    pair, noise, _, prompts, _ = _setting(family)
    latents = torch.stack([e.latents for e in tiny.tiny_examples(2)])
    sigma = torch.tensor([0.3, 0.8])
    value = flow_matching(family.predict_velocity, pair, latents, noise, sigma, prompts)
    gradients = _gradients(pair)
    each = [
        torch.nn.functional.mse_loss(
            family.predict_velocity((1 - s) * latents[i : i + 1] + s * noise[i : i + 1], s, prompts[i : i + 1]),
            (noise - latents)[i : i + 1],
        )
        for i, s in enumerate(sigma)
    ]
    total = torch.stack(each).mean()
    total.backward()
    torch.testing.assert_close(value, total.detach(), rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients, _gradients(pair), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_sampling_takes_the_noise_and_its_grid_to_where_the_model_is():
    """The ``meta`` device stands for a GPU."""
    told = [{"caption": torch.zeros(1, device="meta")}]

    def velocity(x, sigma, conditioning):
        assert (x.device.type, sigma.device.type, conditioning) == ("meta", "meta", told)
        return x

    toy = SimpleNamespace(device=torch.device("meta"), sigmas=lambda *_: torch.linspace(1, 0, 3), velocity=velocity)
    assert sample(toy, told, 2, 8, 8, noise=torch.zeros(1, 1, 1, 1)).device.type == "meta"
