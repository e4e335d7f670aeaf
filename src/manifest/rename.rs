//! Names with other prefixes than those of the start-up checkpoint, as trainers and tools write them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use dp_sidecar_protocol::machine::weight_update::{OddTensor, Renames};

use super::{Fault, Manifest, ManifestError};

/// More prefixes in one checkpoint are no matter of prefixes.
const MOST: usize = 8;
/// So many names are tried for what theirs may have been.
const TRIED: usize = 16;

impl Manifest {
    /// With these prefixes replaced.
    pub fn renamed(&self, renames: &Renames) -> Result<Self, ManifestError> {
        if renames.is_empty() {
            return Ok(self.clone());
        }
        let mut renamed = self.clone();
        let (mut seen, mut faults) = (BTreeMap::new(), Vec::new());
        for (old, tensor) in self.tensors.iter().zip(&mut renamed.tensors) {
            tensor.name = renames.apply(&old.name);
            if let Some(first) = seen.insert(tensor.name.clone(), &old.name) {
                let (name, second) = (tensor.name.clone(), old.name.clone());
                faults.push(Fault::Duplicate { name, first: first.clone(), second });
            }
        }
        for from in renames.unused(self.tensors.iter().map(|tensor| tensor.name.as_str())) {
            faults.push(Fault::NoSuchPrefix { from: from.to_owned() });
        }
        self.fail_on(faults)?;
        Ok(renamed)
    }
}

/// What the names that only one of two checkpoints has come to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hint {
    /// These prefixes lead from unexpected names to missing ones.
    pub renames: Renames,
    /// Unexpected names that they translate to a missing one of the same shape.
    pub fit: usize,
    /// Names that stay unexpected or missing.
    pub left: usize,
    /// With them all names are those of the model.
    pub total: bool,
}

/// Looks for prefixes that lead from unexpected names to missing ones, one to one and with equal shapes. `all`: the
/// checkpoint, if it is at hand. Without it nobody knows what becomes of its other names.
pub(super) fn hint(odd: &[OddTensor], all: Option<&Manifest>) -> Option<Hint> {
    let part = |missing: bool| {
        let of = odd.iter().filter(move |odd| odd.missing == missing);
        of.map(|odd| (odd.name.as_str(), &odd.shape[..])).collect::<BTreeMap<_, _>>()
    };
    let (mut unexpected, mut missing) = (part(false), part(true));
    let mut hint = Hint::default();
    while hint.renames.len() < MOST {
        let Some((from, to)) = best(&unexpected, &missing) else { break };
        let found = fits(&unexpected, &missing, &from, &to);
        hint.fit += found.len();
        for (old, new) in found {
            unexpected.remove(old);
            missing.remove(new.as_str());
        }
        hint.renames.insert(from, to);
    }
    hint.left = unexpected.len() + missing.len();
    let odd: BTreeSet<&str> = odd.iter().map(|odd| odd.name.as_str()).collect();
    let stays = |name: &str| odd.contains(name) || hint.renames.apply(name) == name;
    hint.total =
        hint.left == 0 && all.is_some_and(|all| all.tensors.iter().all(|tensor| stays(&tensor.name)));
    (hint.fit > 0).then_some(hint)
}

type Names<'a> = BTreeMap<&'a str, &'a [u64]>;

/// The prefix that brings the most names to where they belong.
fn best(unexpected: &Names<'_>, missing: &Names<'_>) -> Option<(String, String)> {
    let step = (unexpected.len() / TRIED).max(1);
    let tried = unexpected.iter().step_by(step).filter_map(|(name, shape)| {
        let alike = missing.iter().filter(|(_, of)| *of == shape);
        let ends = alike.map(|(other, _)| (common_end(name, other), *other));
        let (end, other) = ends.filter(|(end, _)| *end > 0).max_by_key(|(end, _)| *end)?;
        Some((name[..name.len() - end].to_owned(), other[..other.len() - end].to_owned()))
    });
    let candidates: BTreeSet<(String, String)> = tried.collect();
    let scored = candidates.into_iter().map(|(from, to)| {
        let score = fits(unexpected, missing, &from, &to).len();
        (score, from, to)
    });
    let (_, from, to) = scored.filter(|(score, ..)| *score > 0).max_by_key(|(score, ..)| *score)?;
    Some((from, to))
}

/// Names that begin with `from`, and with `to` instead are missing ones; none, unless that holds for all that begin so.
fn fits<'a>(unexpected: &Names<'a>, missing: &Names<'_>, from: &str, to: &str) -> Vec<(&'a str, String)> {
    let begin = unexpected.iter().filter_map(|(name, shape)| Some((*name, name.strip_prefix(from)?, shape)));
    let translated = begin.map(|(name, rest, shape)| {
        let new = format!("{to}{rest}");
        (missing.get(new.as_str()) == Some(shape)).then_some((name, new))
    });
    translated.collect::<Option<Vec<_>>>().unwrap_or_default()
}

/// How much two names have in common at their ends, in whole parts.
fn common_end(one: &str, other: &str) -> usize {
    let parts = one.rsplit('.').zip(other.rsplit('.')).take_while(|(part, same)| part == same);
    let lengths = parts.map(|(part, _)| part.len() + 1);
    lengths.sum::<usize>().saturating_sub(1)
}

/// Follows the faults.
impl fmt::Display for Hint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { renames, fit, left, total } = self;
        if *total {
            f.write_str("; all of them fit with")?;
            return renames.iter().try_for_each(|(from, to)| write!(f, " --rename {from}={to}"));
        }
        let told = renames.iter().map(|(from, to)| format!("{from:?} where the model has {to:?}"));
        let told = told.collect::<Vec<_>>().join(", ");
        write!(f, "; {fit} names begin with {told} ({left} others fit nothing): see --rename")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn odd(names: &[(&str, u64, bool)]) -> Vec<OddTensor> {
        let odd = |(name, size, missing): &(&str, u64, bool)| OddTensor {
            name: (*name).to_owned(),
            dtype: "BF16".to_owned(),
            shape: vec![*size],
            missing: *missing,
        };
        names.iter().map(odd).collect()
    }

    #[test]
    fn prefixes_are_found_when_they_lead_one_to_one_to_names_of_the_same_shape() {
        let tensor = |name: &str| super::super::Tensor {
            file: 0,
            name: name.to_owned(),
            dtype: String::new(),
            shape: Vec::new(),
            start: 0,
            len: 0,
        };
        let all = |names: &[(&str, u64, bool)], both: &str| {
            let new = names.iter().filter(|(.., missing)| !missing).map(|(name, ..)| tensor(name));
            let tensors = new.chain([tensor(both)]).collect();
            Manifest { path: "/new".into(), files: Vec::new(), tensors }
        };
        let told = |names: &[(&str, u64, bool)]| {
            hint(&odd(names), Some(&all(names, "both"))).map(|hint| hint.to_string())
        };
        let model = [("model.a.w", 1, true), ("model.b.w", 2, true), ("head.w", 3, true)];
        let with = |more: &[(&'static str, u64, bool)]| [&model[..], more].concat();
        let wrapped = [("base.model.a.w", 1, false), ("base.model.b.w", 2, false), ("base.head.w", 3, false)];
        assert_eq!(told(&with(&wrapped)).unwrap(), "; all of them fit with --rename base.=");
        // Nobody offers what would change the names that fit.
        let bare = with(&[("a.w", 1, false), ("b.w", 2, false), ("x.head.w", 3, false)]);
        assert!(told(&bare).unwrap().ends_with("(0 others fit nothing): see --rename"));
        assert!(!hint(&odd(&with(&wrapped)), None).unwrap().total);
        let all = all(&bare, "x.y.w");
        assert!(!hint(&odd(&bare), Some(&all)).unwrap().total);
        let two = [("lm.a.w", 1, false), ("lm.b.w", 2, false), ("out.head.w", 3, false)];
        assert_eq!(told(&with(&two)).unwrap(), "; all of them fit with --rename out.= --rename lm.=model.");
        let other_shape = [("base.model.a.w", 1, false), ("base.model.b.w", 9, false)];
        assert_eq!(told(&with(&other_shape)), None);
        let partly = [("base.model.a.w", 1, false), ("base.model.b.w", 2, false)];
        assert_eq!(
            told(&with(&partly)).unwrap(),
            "; 2 names begin with \"base.\" where the model has \"\" (1 others fit nothing): see --rename"
        );
        assert_eq!(told(&model), None);
    }

    #[test]
    fn the_longest_prefix_counts_and_each_must_be_of_use() {
        let mut renames = Renames::default();
        renames.insert("a.".to_owned(), "x.".to_owned());
        renames.insert("a.b.".to_owned(), String::new());
        let of = |name: &str| renames.apply(name);
        assert_eq!([of("a.w"), of("a.b.w"), of("b.w")], ["x.w", "w", "b.w"]);
        assert_eq!(renames.unused(["a.b.w", "c"].into_iter()), BTreeSet::from(["a."]));
    }
}
