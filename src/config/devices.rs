//! Which devices each rank of this node gets.

use thiserror::Error;

use crate::supervisor::command::DeviceSlice;

/// Variables that choose devices, the more specific platform first. vLLM reads the one of its
/// platform (`device_control_env_var` in `vllm/platforms`).
const VARIABLES: [&str; 3] = ["HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"];

/// Chooses the cores of workers on CPU.
const CORES: &str = "VLLM_CPU_OMP_THREADS_BIND";

/// The devices do not suffice.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DeviceError {
    /// Fewer than the ranks of this node need: `world_size` each.
    #[error(
        "{ranks} ranks of {world_size} devices each need {} devices, but {} are visible ({}, from {source_of_list})",
        ranks * world_size, devices.len(), devices.join(",")
    )]
    TooFew { ranks: usize, world_size: usize, devices: Vec<String>, source_of_list: String },
    /// Another number of lists of cores than workers.
    #[error(
        "VLLM_CPU_OMP_THREADS_BIND={value:?} has {found} lists of cores (separated by |), expected {expected}: one for \
         each worker of the {ranks} ranks of this node, in their order"
    )]
    Cores { value: String, found: usize, expected: usize, ranks: usize },
    /// One device twice.
    #[error("device {device} is listed twice in {source_of_list}")]
    Twice { device: String, source_of_list: String },
}

/// Where the list of devices comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Visible {
    /// The variable that the ranks get.
    variable: String,
    /// Indices or UUIDs.
    devices: Vec<String>,
    /// Who named them.
    source: String,
}

/// What the ranks of this node get: `world_size` of the visible devices each, or cores where there are none; and the
/// variable that hides all devices, if one does.
///
/// # Errors
/// [`DeviceError`].
pub fn of_ranks(
    given: Option<&str>,
    variable: impl Fn(&str) -> Option<String>,
    nvml_count: impl FnOnce() -> u32,
    ranks: usize,
    world_size: usize,
) -> Result<(Vec<DeviceSlice>, Option<&'static str>), DeviceError> {
    if let Some(visible) = visible(given, &variable, nvml_count) {
        return Ok((slices(&visible, ranks, world_size)?, None));
    }
    let hides = |name: &&str| variable(name).is_some_and(|value| value.trim().is_empty());
    let slices = cores(variable(CORES).as_deref(), ranks, world_size)?;
    Ok((slices, VARIABLES.into_iter().find(hides)))
}

/// The devices this node may use: as given, as the environment says, or all that NVML counts. An empty variable hides
/// them all, as it does for the driver. `None`: no accelerators.
fn visible(
    given: Option<&str>,
    variable: impl Fn(&str) -> Option<String>,
    nvml_count: impl FnOnce() -> u32,
) -> Option<Visible> {
    // One that names devices counts before one that hides them: each platform looks at its own only.
    let set = |empty: bool| {
        let value = |name: &str| variable(name).filter(|value| value.trim().is_empty() == empty);
        VARIABLES.iter().find_map(|name| Some((*name, value(name)?)))
    };
    let in_environment = set(false).or_else(|| set(true));
    let name = in_environment.as_ref().map_or("CUDA_VISIBLE_DEVICES", |(name, _)| name);
    let (devices, source) = match (given, &in_environment) {
        (Some(list), _) => (split(list), "--device-ids".to_owned()),
        (None, Some((name, list))) => (split(list), (*name).to_owned()),
        (None, None) => {
            let count = nvml_count();
            ((0..count).map(|i| i.to_string()).collect(), "NVML".to_owned())
        }
    };
    (!devices.is_empty()).then(|| Visible { variable: name.to_owned(), devices, source })
}

fn split(list: &str) -> Vec<String> {
    list.split(',').map(|device| device.trim().to_owned()).filter(|device| !device.is_empty()).collect()
}

/// Cuts the visible devices into one slice per rank: rank i gets the i-th `world_size` of them, as
/// vLLM would give them to its local ranks.
fn slices(visible: &Visible, ranks: usize, world_size: usize) -> Result<Vec<DeviceSlice>, DeviceError> {
    for (position, device) in visible.devices.iter().enumerate() {
        if visible.devices[..position].contains(device) {
            return Err(DeviceError::Twice {
                device: device.clone(),
                source_of_list: visible.source.clone(),
            });
        }
    }
    if visible.devices.len() < ranks.saturating_mul(world_size) || world_size == 0 {
        return Err(DeviceError::TooFew {
            ranks,
            world_size,
            devices: visible.devices.clone(),
            source_of_list: visible.source.clone(),
        });
    }
    Ok(visible
        .devices
        .chunks(world_size)
        .take(ranks)
        .map(|devices| DeviceSlice { variable: visible.variable.clone(), value: devices.join(",") })
        .collect())
}

/// Which cores each rank gets, by vLLM's own list of them for all ranks of a node (`vllm/utils/ompmultiprocessing.py`,
/// 0.32.0): each launcher takes its rank for the first one of the node.
fn cores(binding: Option<&str>, ranks: usize, world_size: usize) -> Result<Vec<DeviceSlice>, DeviceError> {
    let Some(value) = binding.filter(|value| !["", "auto", "nobind"].contains(value)) else {
        return Ok(Vec::new());
    };
    let lists: Vec<&str> = value.split('|').collect();
    let expected = ranks.saturating_mul(world_size);
    if lists.len() != expected || world_size == 0 {
        return Err(DeviceError::Cores { value: value.to_owned(), found: lists.len(), expected, ranks });
    }
    let slice = |lists: &[&str]| DeviceSlice { variable: CORES.to_owned(), value: lists.join("|") };
    Ok(lists.chunks(world_size).map(slice).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(set: &'static [(&'static str, &'static str)]) -> impl Fn(&str) -> Option<String> {
        move |name| set.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
    }

    fn values(slices: &[DeviceSlice]) -> Vec<&str> {
        slices.iter().map(|slice| slice.value.as_str()).collect()
    }

    #[test]
    fn each_rank_gets_its_slice_of_the_visible_devices() {
        let found = visible(None, environment(&[("CUDA_VISIBLE_DEVICES", "4, 5,6,GPU-abc")]), || {
            panic!("NVML is not asked")
        });
        let slices = slices(&found.unwrap(), 2, 2).unwrap();
        assert_eq!(values(&slices), ["4,5", "6,GPU-abc"]);
        assert_eq!(slices[0].variable, "CUDA_VISIBLE_DEVICES");
    }

    #[test]
    fn an_explicit_list_wins_and_keeps_the_platforms_variable() {
        let found = visible(Some("1,0"), environment(&[("HIP_VISIBLE_DEVICES", "0,1,2,3")]), || 0).unwrap();
        assert_eq!(found.variable, "HIP_VISIBLE_DEVICES");
        assert_eq!(values(&slices(&found, 2, 1).unwrap()), ["1", "0"]);
    }

    #[test]
    fn an_empty_variable_hides_all_devices_and_no_device_is_no_slice() {
        assert_eq!(visible(None, environment(&[("CUDA_VISIBLE_DEVICES", " ")]), || 8), None);
        let given = visible(Some("1"), environment(&[("CUDA_VISIBLE_DEVICES", "")]), || 8).unwrap();
        assert_eq!(given.devices, ["1"]);
        assert_eq!(visible(None, environment(&[]), || 0), None);
        let of_ranks = |set| of_ranks(None, environment(set), || 0, 2, 4).unwrap();
        assert_eq!(of_ranks(&[]), (Vec::new(), None));
        assert_eq!(of_ranks(&[("CUDA_VISIBLE_DEVICES", "")]), (Vec::new(), Some("CUDA_VISIBLE_DEVICES")));
    }

    #[test]
    fn too_few_devices_are_told_with_numbers() {
        let found = visible(None, environment(&[]), || 3).unwrap();
        let error = slices(&found, 2, 2).unwrap_err();
        assert_eq!(
            error.to_string(),
            "2 ranks of 2 devices each need 4 devices, but 3 are visible (0,1,2, from NVML)"
        );
        let twice = visible(Some("0,0"), environment(&[]), || 0).unwrap();
        assert!(matches!(slices(&twice, 1, 1), Err(DeviceError::Twice { .. })));
    }

    #[test]
    fn each_rank_gets_its_own_cores_of_the_list_for_the_node() {
        assert_eq!(values(&cores(Some("0|1"), 2, 1).unwrap()), ["0", "1"]);
        assert_eq!(values(&cores(Some("0-3|4-7|8,9|10"), 2, 2).unwrap()), ["0-3|4-7", "8,9|10"]);
        for all in [None, Some(""), Some("auto"), Some("nobind")] {
            assert_eq!(cores(all, 2, 1), Ok(Vec::new()));
        }
        let error = cores(Some("0-3"), 2, 1).unwrap_err().to_string();
        assert!(error.starts_with("VLLM_CPU_OMP_THREADS_BIND=\"0-3\" has 1 lists of cores"), "{error}");
        assert!(error.contains("expected 2: one for each worker of the 2 ranks"), "{error}");
    }
}
