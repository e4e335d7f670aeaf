//! Accelerators of this node, through NVML.

use serde::{Deserialize, Serialize};

/// What is known about the accelerators. A machine without any is a normal answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GpuReport {
    /// Where the figures come from: `nvml`, `none`, `fake`.
    pub source: String,
    /// Why there are none, if there are none.
    pub reason: Option<String>,
    /// Driver version.
    pub driver_version: Option<String>,
    /// The devices, in NVML order (PCI order, without regard to `CUDA_VISIBLE_DEVICES`).
    pub devices: Vec<GpuDevice>,
}

/// One device. A field that the device or driver does not support is `None`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GpuDevice {
    /// NVML index.
    pub index: u32,
    /// UUID, `GPU-...`.
    pub uuid: Option<String>,
    /// Product name.
    pub name: Option<String>,
    /// Bytes of memory.
    pub memory_total: Option<u64>,
    /// Bytes in use.
    pub memory_used: Option<u64>,
    /// Percent of time a kernel ran.
    pub utilization: Option<u32>,
    /// Degrees Celsius.
    pub temperature: Option<u32>,
    /// ECC is on.
    pub ecc_enabled: Option<bool>,
    /// Uncorrected ECC errors since the driver was loaded.
    pub ecc_uncorrected: Option<u64>,
    /// Processes with a compute context, as this container sees them.
    pub processes: Option<Vec<GpuProcess>>,
}

/// A process on a device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuProcess {
    /// Its pid (of the host, in a container without the host's pid namespace).
    pub pid: u32,
    /// Bytes it holds, if the driver says so.
    pub memory: Option<u64>,
}

/// Number of devices NVML sees; 0 without a driver.
pub fn count() -> u32 {
    nvml_wrapper::Nvml::init()
        .and_then(|nvml| nvml.device_count())
        .unwrap_or(0)
}
