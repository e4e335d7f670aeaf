//! Whether a checkpoint fits the one that the engines were started from.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use dp_sidecar_protocol::machine::weight_update::{Fit, OddTensor};

use super::rename::hint;
use super::{Fault, Manifest, ManifestError, Tensor};

/// Element types that hold plain numbers: a cast rounds, and means the same. All others (quantized formats, fp8,
/// integers) mean something only together with their scales, or are indices.
const FLOATS: [&str; 4] = ["BF16", "F16", "F32", "F64"];
/// About so many tensors that only one side has vLLM's loader can be asked. More have another reason, such as other
/// prefixes.
const MOST_ODD: usize = 8192;
/// Compared at once.
const PIECE: usize = 1 << 20;

impl Manifest {
    /// Compares with the manifest of the checkpoint the model was started from: same shapes, element types that are
    /// equal or that vLLM's loader casts (`Tensor.copy_`), same names. Gives the tensors that only one of the two has,
    /// unless it is known already that they do not matter: whether they do, only vLLM's loader can say.
    pub fn check_against(&self, model: &Self, fit: &Fit) -> Result<Vec<OddTensor>, ManifestError> {
        let (ours, wanted) = (self.by_name(), model.by_name());
        let copies = copies(&ours, &wanted, fit);
        let known = |name: &str| {
            fit.ignored.contains(name) || copies.get(name).is_some_and(|of| ours.contains_key(of))
        };
        let (mut faults, mut odd) = (Vec::new(), Vec::new());
        for (name, expected) in &wanted {
            let Some(actual) = ours.get(name) else {
                odd.extend((!known(name)).then(|| odd_tensor(expected, true)));
                continue;
            };
            if actual.shape != expected.shape {
                faults.push(Fault::Shape {
                    name: (*name).to_owned(),
                    expected: expected.shape.clone(),
                    actual: actual.shape.clone(),
                });
            }
            if let Some(reason) = refuses_cast(&actual.dtype, &expected.dtype, fit) {
                faults.push(Fault::Dtype {
                    name: (*name).to_owned(),
                    expected: expected.dtype.clone(),
                    actual: actual.dtype.clone(),
                    reason,
                });
            }
        }
        for (name, actual) in ours.iter().filter(|(name, _)| !wanted.contains_key(*name)) {
            odd.extend((!known(name)).then(|| odd_tensor(actual, false)));
        }
        for (name, of) in copies {
            if let (Some(one), Some(other)) = (ours.get(name), ours.get(of))
                && (&one.shape, &one.dtype) != (&other.shape, &other.dtype)
            {
                faults.push(Fault::Copy { name: name.to_owned(), of: of.to_owned() });
            }
        }
        if faults.is_empty() && odd.len() <= MOST_ODD {
            return Ok(odd);
        }
        let hint = hint(&odd, Some(self));
        faults.extend(odd.into_iter().map(Fault::from));
        Err(ManifestError::Tensors { path: self.path.clone(), faults, hint })
    }

    /// Whether tensors that the model has as one are equal here. `read` fills a buffer from a byte of a tensor on.
    pub fn check_copies(
        &self,
        model: &Self,
        fit: &Fit,
        read: impl Fn(&Tensor, u64, &mut [u8]) -> Result<(), ManifestError>,
    ) -> Result<(), ManifestError> {
        let ours = self.by_name();
        let mut faults = Vec::new();
        for (name, of) in copies(&ours, &model.by_name(), fit) {
            let (Some(one), Some(other)) = (ours.get(name), ours.get(of)) else { continue };
            let (mut left, mut right) = (vec![0; PIECE], vec![0; PIECE]);
            let mut at = 0;
            while at < one.len {
                let size = usize::try_from(one.len - at).unwrap_or(PIECE).min(PIECE);
                read(one, at, &mut left[..size])?;
                read(other, at, &mut right[..size])?;
                if left[..size] != right[..size] {
                    faults.push(Fault::Copy { name: name.to_owned(), of: of.to_owned() });
                    break;
                }
                at += size as u64;
            }
        }
        self.fail_on(faults)
    }
}

impl ManifestError {
    /// The model needs these. `all`: the checkpoint, if it is at hand.
    pub fn odd(path: &Path, odd: Vec<OddTensor>, all: Option<&Manifest>) -> Self {
        let hint = hint(&odd, all);
        Self::Tensors { path: path.to_owned(), faults: odd.into_iter().map(Fault::from).collect(), hint }
    }
}

impl From<OddTensor> for Fault {
    fn from(OddTensor { name, missing, .. }: OddTensor) -> Self {
        if missing { Self::Missing { name } } else { Self::Unexpected { name } }
    }
}

fn odd_tensor(Tensor { name, dtype, shape, .. }: &Tensor, missing: bool) -> OddTensor {
    let shape = shape.iter().map(|dimension| *dimension as u64).collect();
    OddTensor { name: name.clone(), dtype: dtype.clone(), shape, missing }
}

/// Why numbers of one element type are not loaded into another one.
fn refuses_cast(from: &str, to: &str, fit: &Fit) -> Option<&'static str> {
    if from == to {
        return None;
    }
    if !FLOATS.contains(&from) || !FLOATS.contains(&to) {
        return Some("only BF16, F16, F32 and F64 are cast to each other");
    }
    fit.strict_dtype.then_some("no cast with --strict-dtype")
}

type ByName<'a> = BTreeMap<&'a str, &'a Tensor>;

/// Which tensor is a copy of which one, by the names that either checkpoint has for them.
fn copies<'a>(ours: &ByName<'a>, wanted: &ByName<'a>, fit: &Fit) -> BTreeMap<&'a str, &'a str> {
    if fit.tied.is_empty() {
        return BTreeMap::new();
    }
    let names: BTreeSet<&str> = ours.keys().chain(wanted.keys()).copied().collect();
    // vLLM's name of a parameter has another prefix than the checkpoint's now and then.
    let find = |parameter: &str| {
        let parameter = parameter.replace(".base_layer.", ".");
        if let Some(name) = names.get(parameter.as_str()) {
            return Some(*name);
        }
        let mut alike = names.iter().filter(|name| tail(name) == tail(&parameter));
        alike.next().filter(|_| alike.next().is_none()).copied()
    };
    let pairs = fit.tied.iter().filter_map(|(copy, of)| Some((find(copy)?, find(of)?)));
    pairs.filter(|(copy, of)| copy != of).collect()
}

/// The last two parts of a name.
fn tail(name: &str) -> &str {
    name.rmatch_indices('.').nth(1).map_or(name, |(at, _)| &name[at + 1..])
}
