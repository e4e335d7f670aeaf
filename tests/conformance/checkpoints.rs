//! Checkpoints that differ from the one of the start, as trainers and tools write them.

use std::path::Path;

use dp_sidecar_testkit::engine::weights;
use serde_json::json;

use super::harness::{Model, directory, model, states, weight_versions};
use super::update::{Rig, rig_of};

/// Name, element type, shape, and the byte that fills it.
pub(super) type Tensor = (&'static str, &'static str, &'static [usize], u8);

pub(super) const HEAD: Tensor = ("lm_head.weight", "BF16", &[320, 8], 1);
pub(super) const EMBEDDING: Tensor = ("model.embed_tokens.weight", "BF16", &[320, 8], 1);
pub(super) const NORM: Tensor = ("model.norm.weight", "BF16", &[8], 1);

/// A model of these tensors, with more in its configuration.
pub(super) fn made(
    parent: &Path,
    name: &str,
    tensors: &[Tensor],
    config: &[(&str, serde_json::Value)],
) -> Model {
    let Model { path, .. } = model(parent, name, 0, false);
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, fill) in tensors {
        let width = if *dtype == "F32" { 4 } else { 2 };
        let start = data.len();
        data.resize(start + width * shape.iter().product::<usize>(), *fill);
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]});
        header.insert((*name).to_owned(), entry);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    std::fs::write(path.join("model.safetensors"), file).unwrap();
    let text = std::fs::read(path.join("config.json")).unwrap();
    let mut all: serde_json::Value = serde_json::from_slice(&text).unwrap();
    for (key, value) in config {
        all[*key] = value.clone();
    }
    std::fs::write(path.join("config.json"), all.to_string()).unwrap();
    let files = weights::files(&path).unwrap();
    let digest = weights::read(&path, &files).unwrap().digest;
    Model { path, digest }
}

fn serving(tensors: &[Tensor], config: &[(&str, serde_json::Value)]) -> Rig {
    let directory = directory();
    let old = made(directory.path(), "old", tensors, config);
    rig_of(directory, old, false, "")
}

pub(super) fn filled(tensor: Tensor, fill: u8) -> Tensor {
    (tensor.0, tensor.1, tensor.2, fill)
}

impl Rig {
    fn make(&mut self, name: &str, tensors: &[Tensor]) {
        self.new = made(self.directory.path(), name, tensors, &[]);
    }

    #[track_caller]
    fn commits(&mut self, more: &[&str]) {
        let said = self.update(&self.new.path, more);
        assert_eq!(said.code, 0, "{}", said.text());
        let name = self.new.path.file_name().unwrap().to_str().unwrap().to_owned();
        self.assert_serves("new", &name);
    }

    #[track_caller]
    fn refuses(&self, more: &[&str], expected: &str) {
        let said = self.update(&self.new.path, more);
        assert_eq!(said.code, 10, "{}", said.text());
        assert!(said.text().contains(expected), "{}", said.text());
    }
}

#[test]
fn a_checkpoint_in_another_float_type_is_cast_unless_that_is_refused() {
    let mut rig = serving(&[HEAD, EMBEDDING, NORM], &[]);
    rig.make("f32", &[HEAD, EMBEDDING, ("model.norm.weight", "F32", &[8], 2)]);
    rig.refuses(
        &["--strict-dtype"],
        "model.norm.weight has dtype F32, expected BF16: no cast with --strict-dtype",
    );
    rig.assert_serves("old", "still");
    rig.commits(&[]);
}

#[test]
fn a_tied_head_may_be_there_or_not_and_must_not_differ() {
    for base in [&[EMBEDDING, NORM][..], &[EMBEDDING, NORM, HEAD]] {
        let mut rig = serving(base, &[("tie_word_embeddings", true.into())]);
        let new = [filled(EMBEDDING, 2), filled(NORM, 2)];
        rig.make("differs", &[new[0], new[1], filled(HEAD, 3)]);
        rig.refuses(&[], "lm_head.weight differs from model.embed_tokens.weight");
        rig.assert_serves("old", "still");
        rig.make("without", &new);
        rig.commits(&[]);
        rig.make("with", &[new[0], new[1], filled(HEAD, 2)]);
        rig.commits(&["--retain", "disk", "--allow-no-rollback"]);
    }
}

#[test]
fn a_head_that_differs_at_the_start_is_a_parameter_of_its_own() {
    let mut rig = serving(&[filled(HEAD, 5), EMBEDDING, NORM], &[("tie_word_embeddings", true.into())]);
    rig.make("without", &[EMBEDDING, NORM]);
    rig.refuses(&[], "missing lm_head.weight");
    rig.make("other", &[filled(HEAD, 6), EMBEDDING, NORM]);
    rig.commits(&[]);
}

const ROTARY: Tensor = ("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", &[4], 1);
pub(super) const MTP: Tensor = ("mtp.fc.weight", "BF16", &[8], 1);

#[test]
fn tensors_that_vllm_does_not_load_do_not_count_and_those_that_it_needs_do() {
    let needed = [filled(HEAD, 2), filled(EMBEDDING, 2), filled(NORM, 2)];
    for base in [&[HEAD, EMBEDDING, NORM, ROTARY, MTP][..], &[HEAD, EMBEDDING, NORM]] {
        let mut rig = serving(base, &[("num_nextn_predict_layers", 1.into())]);
        rig.make("lacks", &[needed[0], needed[1], ROTARY]);
        rig.refuses(&[], "1 tensor fault: missing model.norm.weight");
        rig.make("more", &[needed[0], needed[1], needed[2], MTP, ("model.extra", "BF16", &[8], 1)]);
        rig.refuses(&[], "1 tensor fault: unexpected model.extra");
        rig.assert_serves("old", "still");
        rig.make("plain", &needed);
        rig.commits(&[]);
        rig.make("everything", &[needed[0], needed[1], needed[2], ROTARY, MTP]);
        rig.commits(&["--retain", "disk", "--allow-no-rollback"]);
    }
    // The same name counts where the model has no such layers.
    let mut rig = serving(&[HEAD, EMBEDDING, NORM], &[]);
    rig.make("more", &[HEAD, EMBEDDING, NORM, MTP]);
    rig.refuses(&[], "1 tensor fault: unexpected mtp.fc.weight");
}

#[test]
fn names_with_other_prefixes_are_refused_with_the_renaming_that_fits_and_taken_with_it() {
    let mut rig = serving(&[HEAD, EMBEDDING, NORM], &[]);
    let prefixed = [
        ("base.lm_head.weight", "BF16", &[320usize, 8] as &[usize], 2),
        ("base.model.embed_tokens.weight", "BF16", &[320, 8], 2),
        ("base.model.norm.weight", "BF16", &[8], 2),
    ];
    rig.make("lacks", &prefixed[..2]);
    // Quoted in JSON.
    let says =
        r#"2 names begin with \"base.\" where the model has \"\" (1 others fit nothing): see --rename"#;
    rig.refuses(&[], says);
    rig.refuses(&["--rename", "base.="], "1 tensor fault: missing model.norm.weight");
    rig.make("prefixed", &prefixed);
    rig.refuses(&[], "; all of them fit with --rename base.=");
    rig.refuses(&["--rename", "other.="], "no name begins with");
    rig.refuses(
        &["--rename", "base.model.=model.", "--rename", "base.lm_head.=model.norm."],
        "duplicate model.norm.weight",
    );
    rig.assert_serves("old", "still");
    rig.commits(&["--rename", "base.=", "--version", "v2"]);
    // An engine that comes later loads it under the same names.
    rig.sidecar.set_faults(1, "die:now");
    rig.sidecar.await_status("rank 1 down", |status| states(status)[1] != "admitted");
    rig.sidecar.set_faults(1, "");
    assert_eq!(weight_versions(&rig.sidecar.await_admitted()), ["v2", "v2"]);
    rig.assert_serves("new", "late");
}
