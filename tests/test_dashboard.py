"""sae-dashboard on an ITDA, beside a TopKSAE of the same weights.

It declares older versions of transformer-lens and transformers than ours, and runs with ours all the same:
`pip install --no-deps sae-dashboard==0.8.0` and `pip install dataclasses-json eindex-callum matplotlib`.
"""

import re

import pytest
import torch
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from torch.testing import assert_close

from itda_lens import embedded
from tests.conftest import HOOK

pytest.importorskip("sae_dashboard", reason="sae-dashboard is not installed (see the head of this file)")

from sae_dashboard.data_writing_fns import save_feature_centric_vis
from sae_dashboard.sae_vis_data import SaeVisConfig, SaeVisData
from sae_dashboard.sae_vis_runner import SaeVisRunner

pytestmark = pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")


@pytest.fixture(scope="module")
def tokens(model):
    texts = [text for text in embedded.dataset("heldout")["text"] if len(text) > 400]
    return torch.cat([model.to_tokens(text)[:, :32] for text in texts[:40]])


def dashboard_of_some_latents(sae: SAE, model, tokens) -> SaeVisData:
    """Made and compared with the codes."""
    with torch.no_grad():
        acts = sae.encode(model.run_with_cache(tokens, names_filter=[HOOK])[1][HOOK])
    latents = (acts > 0).any(dim=(0, 1)).nonzero().flatten().tolist()[::40]
    config = SaeVisConfig(hook_point=HOOK, features=latents, minibatch_size_tokens=16, device="cpu", dtype="float32")
    made = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
    assert len(latents) > 1
    for latent in latents:
        shown, own = made.feature_data_dict[latent], acts[..., latent]
        density = re.search(r"DENSITY = ([\d.]+)%", shown.acts_histogram_data.title)
        assert float(density[1]) == pytest.approx(100 * float((own > 0).double().mean()), abs=6e-4)
        assert f"MAX = {own.max():.3f}" in shown.sequence_data.seq_group_data[0].title
        assert_close(shown.feature_tables_data.neuron_alignment_values[0], float(sae.W_dec[latent].max()))
    return made


def test_the_dashboard_of_an_itda_shows_the_codes_of_its_pursuit(model, built, tokens, tmp_path):
    itda = built.with_k(8)
    made = dashboard_of_some_latents(itda, model, tokens)
    save_feature_centric_vis(made, tmp_path / "page.html")
    assert "DENSITY" in (tmp_path / "page.html").read_text(encoding="utf8")
    assert torch.equal(itda.W_dec, built.W_dec)
    itda.encode(torch.randn(3, 96)).sum().backward()  # nothing of the dashboard's inference mode is left


def test_a_topk_sae_of_the_same_weights_shows_what_it_has(model, built, tokens):
    topk = TopKSAE(TopKSAEConfig(d_in=96, d_sae=256, k=8, rescale_acts_by_decoder_norm=True))
    topk.cfg.metadata = built.cfg.metadata
    topk.W_dec.data[:], topk.W_enc.data[:], topk.b_dec.data[:] = built.W_dec.data, built.W_enc.data, built.b_dec.data
    dashboard_of_some_latents(topk, model, tokens)


def test_its_non_negative_view_shows_negative_codes_as_latents_of_their_own(model, built, tokens):
    view = built.nonnegative_view()
    latents = dashboard_of_some_latents(view, model, tokens).feature_data_dict
    assert max(latents) >= built.cfg.d_sae
