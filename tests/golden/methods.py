"""Golden numbers of every objective through a whole model: losses, and of each gradient its norm and a projection.

Independent of the Rust program: torch's autograd in float64 through transformers' model, the losses written from the papers'
formulas. `generate.py` writes methods.json with it. A gradient g is told by |g| and by sum(g * w) with w the test weights of
seed 9 of its name.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from weights import hashes, test_weight, uniform

FORGET = [(13, 5), (22, 9)]  # (tokens, prompt tokens)
PREFERRED = [(11, 5), (17, 9)]  # other answers to the same prompts
RETAIN = [(9, 4), (23, 10)]
REFUSED = [(12, 4), (15, 10)]  # refusals of the retain prompts
LAYER, STEERING, SEED = 0, 3.0, 0
RETAIN_WEIGHT = 0.7


def methods(build, folder, token_ids):
    """{name: {config, forget_loss, retain_loss, loss, gradients: {tensor: [norm, projection]}}}"""
    model, reference = build(folder, seed=0), build(folder, seed=1)
    vocab = model.config.vocab_size
    texts = {
        "forget": [(token_ids(n, vocab, salt=2 + i), p) for i, (n, p) in enumerate(FORGET)],
        "retain": [(token_ids(n, vocab, salt=5 + i), p) for i, (n, p) in enumerate(RETAIN)],
    }
    for name, stream, shapes, salt in (("preferred", "forget", PREFERRED, 11), ("refused", "retain", REFUSED, 17)):
        texts[name] = [(torch.cat([texts[stream][i][0][:p], token_ids(n - p, vocab, salt=salt + i)]), p) for i, (n, p) in enumerate(shapes)]
    case = Case(model, reference, texts)
    result = {"sequences": {name: [{"ids": ids.tolist(), "prompt": p} for ids, p in group] for name, group in texts.items()},
              "retain_weight": RETAIN_WEIGHT, "methods": {}}
    for name, (config, forget, retain) in case.methods().items():
        model.zero_grad()
        f = forget()
        r = retain() if retain else torch.zeros((), dtype=torch.float64)
        total = f + RETAIN_WEIGHT * r
        total.backward()
        gradients = {}
        for tensor, parameter in model.named_parameters():
            g = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            w = torch.from_numpy(test_weight(9, tensor, tuple(parameter.shape))).double()
            gradients[tensor] = [g.norm().item(), (g * w).sum().item()]
        result["methods"][name] = {"config": config, "forget_loss": f.item(), "retain_loss": r.item(), "loss": total.item(),
                                   "gradients": gradients}
    return result


class Case:
    def __init__(self, model, reference, texts):
        self.model, self.reference, self.texts = model, reference, texts

    def methods(self):
        """{name: ([method] of the configuration, forget loss, retain loss)}"""
        def case(objective, forget, retain="none", **keys):
            terms = {"none": None, "nll": self.nll, "kl": self.kl, "ap": self.ap, "embedding": self.embedding}
            return {"objective": objective, "retain": retain} | keys, forget, terms[retain]
        steer = {"layer": LAYER, "update": ["*"]}
        cases = {
            "ga_kl": case("ga", self.ga, "kl"),
            "idk_ap": case("idk", lambda: -self.tokens("preferred").mean(), "ap", retain_beta=0.1),
            "dpo": case("dpo", lambda: self.dpo(0.1), "nll", beta=0.1),
            "kto_paper": case("kto", lambda: self.kto(0.1, False), "nll", beta=0.1),
            "kto_code": case("kto", lambda: self.kto(0.1, True), "none", beta=0.1, form="code"),
            "npo": case("npo", lambda: self.npo(self.forget_sums(), 0.3), "nll", beta=0.3),
            "simnpo": case("simnpo", lambda: self.simnpo(0.5, 0.5), "none", beta=0.5, delta=0.5),
            "wga": case("wga", lambda: self.weighted(lambda p, _: p ** 0.5), "none", beta=0.5),
            "tnpo": case("tnpo", lambda: self.weighted(lambda p, q: 2 * p ** 0.75 / (p ** 0.5 + q ** 0.5 + 1e-5)), "nll", beta=0.5, alpha=1.5),
            "satimp": case("satimp", lambda: self.weighted(lambda p, _: p ** 0.3 * (1 - p) ** 0.1), "none", beta1=0.3, beta2=0.1),
            "ce_u": case("ce_u", lambda: self.rows(ce_u, skip=1), "none", skip_tokens=1),
            "undial": case("undial", lambda: self.rows(undial), "none", beta=5.0),
            "undial_kl": case("undial", lambda: self.rows(undial), "kl", beta=5.0),
            "me_all": case("me", lambda: self.rows(me, everywhere=True), "none", positions="all"),
            "me_answer": case("me", lambda: self.rows(me), "nll", positions="answer"),
            "ihl": case("ihl", lambda: self.rows(ihl), "none"),
            "flat_js_sample": case("flat", lambda: self.flat(js, by_batch=False), "none", divergence="js", mean="sample"),
            "flat_kl_batch": case("flat", lambda: self.flat(kl_flat, by_batch=True), "none", divergence="kl", mean="batch"),
            "flat_tv_sample": case("flat", lambda: self.flat(tv, by_batch=False), "none", divergence="tv", mean="sample"),
            "flat_pearson_batch": case("flat", lambda: self.flat(pearson, by_batch=True), "none", divergence="pearson", mean="batch"),
            "rmu": case("rmu", lambda: self.rmu(), "embedding", steering=STEERING, **steer),
            "rmu_answer": case("rmu", lambda: self.rmu(answer=True), "kl", steering=STEERING, positions="answer", **steer),
            "rmu_adaptive": case("rmu", lambda: self.rmu(adaptive=True), "nll", steering=STEERING, adaptive=True, **steer),
            "rmu_openunlearning": case("rmu", lambda: self.rmu(answer=True, by_sample=True), "embedding", steering=STEERING,
                                       compat="openunlearning", **steer),
            "npo_embedding": case("npo", lambda: self.npo(self.forget_sums(), 0.3), "embedding", beta=0.3, layer=LAYER),
            "pdu": case("pdu", lambda: self.rows(margin), "nll", dual_start=RETAIN_WEIGHT),
            "adv_rmu": case("adv_rmu", self.attacked_rmu, "none", steering=STEERING, layer=1, update=["*"], attack_layer=1,
                            attack_radius=2.0, attack_steps=3),
            "adv_npo": case("adv_npo", lambda: self.npo(self.attacked_sums(), 0.3), "nll", beta=0.3, attack_layer=1, attack_radius=2.0,
                            attack_steps=3),
        }
        cases["rmu_openunlearning"] = (cases["rmu_openunlearning"][0], cases["rmu_openunlearning"][1], lambda: self.embedding(True))
        return cases

    # log-probabilities

    def logits(self, ids, model=None):
        return (model or self.model)(ids[None], use_cache=False).logits[0]

    def scored(self, text, model=None):
        ids, prompt = text
        return torch.log_softmax(self.logits(ids, model), -1)[prompt - 1:-1].gather(1, ids[prompt:, None])[:, 0]

    def scored_before(self, text):
        with torch.no_grad():
            return self.scored(text, self.reference)

    def tokens(self, name):
        return torch.cat([self.scored(text) for text in self.texts[name]])

    def sums(self, name):
        return torch.stack([self.scored(text).sum() for text in self.texts[name]])

    def ratios(self, name):
        return torch.stack([self.scored(text).sum() - self.scored_before(text).sum() for text in self.texts[name]])

    def forget_sums(self):
        return self.sums("forget")

    def ga(self):
        return self.tokens("forget").mean()

    def npo(self, sums, beta):
        before = torch.stack([self.scored_before(text).sum() for text in self.texts["forget"]])
        return 2 / beta * F.softplus(beta * (sums - before)).mean()

    def dpo(self, beta):
        return -2 / beta * F.logsigmoid(beta * (self.ratios("preferred") - self.ratios("forget"))).mean()

    def kto(self, beta, code):
        z = self.ratios("preferred").mean().detach()
        loss = -2 / beta * F.logsigmoid((z if code else beta * z) - beta * self.ratios("forget")).mean()
        return 1 + loss if code else loss

    def simnpo(self, beta, delta):
        means = torch.stack([self.scored(text).mean() for text in self.texts["forget"]])
        return -2 / beta * F.logsigmoid(-beta * means - beta * delta).mean()

    def weighted(self, weight):
        logp, before = self.tokens("forget"), torch.cat([self.scored_before(text) for text in self.texts["forget"]])
        return (weight(logp.exp().detach(), before.exp()) * logp).mean()

    def flat(self, divergence, by_batch):
        probability = {name: [self.scored(text).exp() for text in self.texts[name]] for name in ("forget", "preferred")}
        if by_batch:
            return divergence(torch.cat(probability["forget"]).mean(), torch.cat(probability["preferred"]).mean())
        return torch.stack([divergence(f.mean(), e.mean()) for f, e in zip(probability["forget"], probability["preferred"])]).mean()

    # retain terms

    def nll(self):
        return -self.tokens("retain").mean()

    def ap(self):
        return -1 / 0.1 * F.logsigmoid(0.1 * (self.sums("retain") - self.sums("refused"))).mean()

    def kl(self):
        each = []
        for ids, _ in self.texts["retain"]:
            with torch.no_grad():
                before = torch.log_softmax(self.logits(ids, self.reference), -1)
            each.append((before.exp() * (before - torch.log_softmax(self.logits(ids), -1))).sum(-1))
        return torch.cat(each).mean()

    def embedding(self, by_sample=False):
        each = []
        for ids, prompt in self.texts["retain"]:
            with torch.no_grad():
                before = self.hidden(ids, self.reference)
            difference = (self.hidden(ids, self.model) - before).square().mean(-1)
            each.append(difference[prompt:] if by_sample else difference)
        return torch.stack([e.mean() for e in each]).mean() if by_sample else torch.cat(each).mean()

    # whole distributions and hidden states

    def rows(self, loss, skip=0, everywhere=False):
        each = []
        for ids, prompt in self.texts["forget"]:
            z = self.logits(ids)
            with torch.no_grad():
                before = self.logits(ids, self.reference)
            first = 0 if everywhere else prompt - 1
            each += [loss(z[t], ids[t + 1], before[t]) for t in range(first + skip, len(ids) - 1)]
        return torch.stack(each).mean()

    def hidden(self, ids, model):
        """Output of layer LAYER."""
        return model(ids[None], use_cache=False, output_hidden_states=True).hidden_states[LAYER + 1][0]

    def direction(self):
        u = (torch.from_numpy(uniform(SEED, "rmu direction", self.model.config.hidden_size)).double() + 1) / 2
        return u / u.norm()

    def rmu(self, answer=False, adaptive=False, by_sample=False):
        u = self.direction()
        each = []
        for ids, prompt in self.texts["forget"]:
            target = STEERING * u
            if adaptive:
                with torch.no_grad():
                    target = target * self.hidden(ids, self.reference).norm(dim=-1, keepdim=True)
            difference = (self.hidden(ids, self.model) - target).square().mean(-1)
            each.append(difference[prompt:] if answer else difference)
        return torch.stack([e.mean() for e in each]).mean() if by_sample else torch.cat(each).mean()

    def attacked_sums(self):
        """Log-probabilities of the answers under attack."""
        return torch.stack([self.attacked(i, lambda text: self.scored(text)).sum() for i in range(len(FORGET))])

    def attacked_rmu(self):
        """RMU on the output of layer 1 under attack."""
        u = self.direction()
        last = lambda text: self.model(text[0][None], use_cache=False, output_hidden_states=True).hidden_states[2][0]
        return torch.cat([(self.attacked(i, last) - STEERING * u).square().mean(-1) for i in range(len(FORGET))]).mean()

    def attacked(self, index, outcome, layer=1, radius=2.0, steps=3):
        """`outcome` with the perturbation added to the input of layer `layer` that raises the answer's probability most."""
        text, clean = self.texts["forget"][index], {}
        module = self.model.model.layers[layer]

        def forward(delta, what):
            def add(_, args, kwargs):
                x = args[0] if args else kwargs["hidden_states"]
                clean.setdefault("x", x.detach())
                moved = x if delta is None else x + delta
                return ((moved, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": moved})
            handle = module.register_forward_pre_hook(add, with_kwargs=True)
            result = what(text)
            handle.remove()
            return result
        with torch.no_grad():
            forward(None, self.scored)
        x, key = clean["x"], f"attack 0 {index}"
        draw = torch.from_numpy(normal(SEED, key, x.numel() + 1)[1:]).view(x.shape)
        delta = draw * ((uniform(SEED, key, 1)[0].item() + 1) / 2 * radius) / draw.norm()
        for _ in range(steps):
            delta = delta.detach().requires_grad_()
            g, = torch.autograd.grad(-forward(delta, self.scored).sum(), delta)
            with torch.no_grad():
                delta = delta - radius / steps * g / g.norm()
                delta = delta * min(1.0, radius / delta.norm().item())
                delta = (x + delta).clamp(x.min(), x.max()) - x
        return forward(delta.detach(), outcome)


def normal(seed, name, count):
    """Standard normal numbers from the two halves of the bits (Box-Muller)."""
    bits = hashes(seed, name, count)
    radius = ((bits >> np.uint64(32)).astype(np.float64) + 1.0) / 2.0 ** 32
    angle = (bits & np.uint64(0xFFFFFFFF)).astype(np.float64) / 2.0 ** 32
    return np.sqrt(-2.0 * np.log(radius)) * np.cos(2.0 * np.pi * angle)


def me(z, label, before):
    return -math.log(len(z)) - torch.log_softmax(z, -1).mean()


def undial(z, label, before, beta=5.0):
    lowered = before.clone()
    lowered[label] -= beta
    return -(torch.softmax(lowered, -1) * torch.log_softmax(z, -1)).sum()


def ce_u(z, label, before):
    target = z.detach().clone()
    target[label] = -torch.inf
    return -(torch.softmax(target, -1) * torch.log_softmax(z, -1)).sum()


def ihl(z, label, before):
    p = torch.softmax(z, -1)
    others = torch.cat([p[:label], p[label + 1:]])
    return torch.relu(1 + p[label] - others.max())


def margin(z, label, before):
    return (z.max() - z.mean()) ** 2


def tv(f, e):
    return torch.tanh(f) / 2 - torch.tanh(e) / 2


def kl_flat(f, e):
    return torch.exp(f - 1) - e


def js(f, e):
    return torch.log1p(torch.exp(-e)) + f + torch.log1p(torch.exp(-f)) - 2 * math.log(2)


def pearson(f, e):
    return f * f / 4 + f - e
