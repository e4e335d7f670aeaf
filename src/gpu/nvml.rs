//! NVIDIA devices through NVML.

use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::{EccCounter, MemoryError, TemperatureSensor};
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;

use super::{GpuDevice, GpuProcess, GpuReport};

/// NVML, opened. The library is loaded when it is opened, not when this program is: a machine
/// without a driver runs the same binary.
#[derive(Debug)]
pub(super) struct NvmlAccel {
    nvml: Nvml,
}

impl NvmlAccel {
    /// Opens NVML; the error says why there is none.
    pub(super) fn open() -> Result<Self, String> {
        match Nvml::init() {
            Ok(nvml) => Ok(Self { nvml }),
            Err(NvmlError::LibloadingError(error)) => Err(format!("no NVIDIA management library: {error}")),
            Err(error) => Err(error.to_string()),
        }
    }

    /// What is known now. May block.
    pub(super) fn report(&mut self) -> GpuReport {
        match self.read() {
            Ok(report) => report,
            // The driver was reloaded under us: open it anew, once.
            Err(NvmlError::Uninitialized | NvmlError::GpuLost | NvmlError::DriverNotLoaded) => {
                let again = Self::open().and_then(|new| {
                    *self = new;
                    self.read().map_err(|error| error.to_string())
                });
                again.unwrap_or_else(GpuReport::none)
            }
            Err(error) => GpuReport::none(error.to_string()),
        }
    }

    fn read(&self) -> Result<GpuReport, NvmlError> {
        let count = self.nvml.device_count()?;
        Ok(GpuReport {
            source: "nvml".to_owned(),
            reason: (count == 0).then(|| "the driver sees no devices".to_owned()),
            driver_version: self.nvml.sys_driver_version().ok(),
            devices: (0..count).map(|index| self.device(index)).collect(),
        })
    }

    /// One device. Whatever it does not support, or may not be asked, is left out.
    fn device(&self, index: u32) -> GpuDevice {
        let Ok(device) = self.nvml.device_by_index(index) else {
            return GpuDevice { index, ..GpuDevice::default() };
        };
        let memory = device.memory_info().ok();
        let errors = device.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile);
        let processes = device.running_compute_processes().ok();
        GpuDevice {
            index,
            uuid: device.uuid().ok(),
            name: device.name().ok(),
            memory_total: memory.as_ref().map(|memory| memory.total),
            memory_used: memory.as_ref().map(|memory| memory.used),
            utilization: device.utilization_rates().ok().map(|rates| rates.gpu),
            temperature: device.temperature(TemperatureSensor::Gpu).ok(),
            ecc_enabled: device.is_ecc_enabled().ok().map(|state| state.currently_enabled),
            ecc_uncorrected: errors.ok(),
            processes: processes.map(|list| {
                list.into_iter()
                    .map(|process| GpuProcess {
                        pid: process.pid,
                        memory: match process.used_gpu_memory {
                            UsedGpuMemory::Used(bytes) => Some(bytes),
                            UsedGpuMemory::Unavailable => None,
                        },
                    })
                    .collect()
            }),
        }
    }
}
