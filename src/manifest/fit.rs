//! Whether a LoRA adapter fits the model. vLLM 0.32.0 does not compare: it copies what there is into a zeroed or an
//! older slot, so that a tensor that is too small changes a part of a layer without an error.

use std::collections::BTreeMap;

use super::{Fault, Manifest, ManifestError};

/// Element types that are not packed: the header's shape is that of the matrix.
const PLAIN: [&str; 6] = ["BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2"];

type Shape = (usize, usize);

impl Manifest {
    /// Compares the matrices of an adapter with each other, and with the weights of `model` that they change.
    /// Modules that the model does not have under that name are left to vLLM.
    pub fn check_adapter(&self, model: Option<&Self>) -> Result<(), ManifestError> {
        let mut halves: BTreeMap<&str, (Option<Shape>, Option<Shape>)> = BTreeMap::new();
        for (name, shape) in self.matrices(|_| true) {
            if let Some(module) = module(name, ".lora_A") {
                halves.entry(module).or_default().0 = Some(shape);
            } else if let Some(module) = module(name, ".lora_B") {
                halves.entry(module).or_default().1 = Some(shape);
            }
        }
        let plain = |dtype: &str| PLAIN.contains(&dtype);
        let weights: BTreeMap<&str, Shape> =
            model.into_iter().flat_map(|model| model.matrices(plain)).collect();
        let misfit = |(module, pair): (&str, (Option<Shape>, Option<Shape>))| {
            let reason = match pair {
                (Some((rank, _)), Some((_, other))) if rank != other => {
                    format!("lora_A has rank {rank}, lora_B has {other}")
                }
                (Some((_, inputs)), Some((outputs, _))) => {
                    let weight = *weights.get(format!("{module}.weight").as_str())?;
                    if weight == (outputs, inputs) {
                        return None;
                    }
                    format!("{} x {} in the model, {outputs} x {inputs} in the adapter", weight.0, weight.1)
                }
                (Some(_), None) => "has no lora_B".to_owned(),
                _ => "has no lora_A".to_owned(),
            };
            Some(Fault::Misfit { module: module.to_owned(), reason })
        };
        self.fail_on(halves.into_iter().filter_map(misfit).collect())
    }

    fn matrices(&self, dtype: impl Fn(&str) -> bool) -> impl Iterator<Item = (&str, Shape)> {
        self.tensors.iter().filter_map(move |tensor| match tensor.shape[..] {
            [rows, columns] if dtype(&tensor.dtype) => Some((tensor.name.as_str(), (rows, columns))),
            _ => None,
        })
    }
}

/// Module that a tensor of this half belongs to, by PEFT's names.
fn module<'a>(tensor: &'a str, half: &str) -> Option<&'a str> {
    let name = tensor.strip_suffix(".weight")?;
    let name = name.strip_suffix(".default").unwrap_or(name).strip_suffix(half)?;
    Some(name.strip_prefix("base_model.model.").unwrap_or(name))
}
