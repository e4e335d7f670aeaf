//! Accelerators of this node.
//!
//! NVML may block (a sick driver, a device that fell off the bus), so that it is asked on a thread
//! of its own under a deadline. No driver is a normal answer. Nothing here changes a setting.

mod nvml;

use std::path::Path;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use crate::tasks::{Task, rehearse};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use self::nvml::NvmlAccel;

/// How long a report may take.
pub const REPORT_LIMIT: Duration = Duration::from_secs(3);

/// What is known about the accelerators. A machine without any is a normal answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GpuReport {
    /// Where the figures come from: `nvml`, `none`, `fake`.
    pub source: String,
    /// Why there are none, if there are none.
    pub reason: Option<String>,
    pub driver_version: Option<String>,
    /// The devices, in NVML order (PCI order, without regard to `CUDA_VISIBLE_DEVICES`).
    pub devices: Vec<GpuDevice>,
}

impl GpuReport {
    /// There are none, or they cannot be asked.
    fn none(reason: impl Into<String>) -> Self {
        Self { source: "none".to_owned(), reason: Some(reason.into()), ..Self::default() }
    }
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

/// Says what is known about accelerators now. May block.
pub type Accelerators = Box<dyn FnMut() -> GpuReport + Send>;

/// The accelerators of this machine; or those of a JSON file (a [`GpuReport`]), which is read again for each report, for
/// tests and for trying things out.
pub fn detect(file: Option<&Path>) -> Accelerators {
    match file.map(Path::to_owned) {
        Some(file) => Box::new(move || of_file(&file)),
        None => match NvmlAccel::open() {
            Ok(mut nvml) => Box::new(move || nvml.report()),
            Err(reason) => Box::new(move || GpuReport::none(&*reason)),
        },
    }
}

fn of_file(file: &Path) -> GpuReport {
    let read = std::fs::read(file)
        .map_err(|error| error.to_string())
        .and_then(|text| serde_json::from_slice::<GpuReport>(&text).map_err(|error| error.to_string()));
    match read {
        Ok(report) => GpuReport { source: "fake".to_owned(), ..report },
        Err(error) => GpuReport::none(format!("{}: {error}", file.display())),
    }
}

/// Asks accelerators on a thread of its own.
#[derive(Clone, Debug)]
pub struct GpuMonitor {
    asks: SyncSender<oneshot::Sender<GpuReport>>,
}

impl GpuMonitor {
    /// Starts the thread. `open` runs on it, because opening NVML may block, too. The thread ends
    /// when the last monitor is dropped; one that hangs inside the driver ends with the process.
    pub fn start(open: impl FnOnce() -> Accelerators + Send + 'static) -> std::io::Result<Self> {
        let (asks, queue) = sync_channel::<oneshot::Sender<GpuReport>>(4);
        std::thread::Builder::new().name("accelerators".to_owned()).spawn(move || {
            let mut accelerators = open();
            while let Ok(reply) = queue.recv() {
                rehearse(Task::Accelerators);
                // The asker may have given up.
                let _ = reply.send(accelerators());
            }
        })?;
        Ok(Self { asks })
    }

    /// What is known now, within [`REPORT_LIMIT`].
    pub async fn report(&self) -> GpuReport {
        self.report_within(REPORT_LIMIT).await
    }

    async fn report_within(&self, limit: Duration) -> GpuReport {
        let (reply, answer) = oneshot::channel();
        match self.asks.try_send(reply) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return GpuReport::none("the driver has not answered for a while"),
            Err(TrySendError::Disconnected(_)) => return GpuReport::none("its thread has ended"),
        }
        match tokio::time::timeout(limit, answer).await {
            Ok(Ok(report)) => report,
            Ok(Err(_)) => GpuReport::none("its thread has ended"),
            Err(_) => GpuReport::none("the driver does not answer"),
        }
    }
}

/// Number of devices; 0 when there are none or the driver does not answer in time.
pub fn count(file: Option<&Path>) -> u32 {
    let file = file.map(Path::to_owned);
    let (sender, receiver) = sync_channel(1);
    let asked = std::thread::Builder::new().name("accelerators".to_owned()).spawn(move || {
        // The asker may have given up.
        let _ = sender.send(detect(file.as_deref())().devices.len());
    });
    let count = asked.ok().and_then(|_| receiver.recv_timeout(REPORT_LIMIT * 3).ok());
    count.and_then(|count| u32::try_from(count).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("accel.json");
        std::fs::write(&path, text).unwrap();
        (dir, path)
    }

    #[test]
    fn a_machine_without_a_driver_has_none_and_says_why() {
        // On a machine with a driver this is the real thing, and has no reason to give.
        let report = detect(None)();
        match report.source.as_str() {
            "none" => {
                assert!(report.devices.is_empty());
                assert!(report.reason.is_some_and(|reason| !reason.is_empty()));
            }
            "nvml" => assert!(report.driver_version.is_some()),
            other => panic!("unexpected source {other}"),
        }
    }

    #[test]
    fn fields_that_a_device_does_not_support_are_null() {
        let (_dir, path) = file(
            r#"{"source":"x","reason":null,"driver_version":"570.1",
                "devices":[{"index":0,"uuid":"GPU-a","memory_total":1024},{"index":1}]}"#,
        );
        assert_eq!(count(Some(&path)), 2);
        let report = detect(Some(&path))();
        assert_eq!(report.source, "fake");
        assert_eq!(report.devices[0].memory_total, Some(1024));
        assert_eq!(report.devices[0].temperature, None);
        assert_eq!(report.devices[1].uuid, None);
    }

    #[test]
    fn a_broken_file_is_an_answer_too() {
        let (_dir, path) = file("{");
        assert_eq!(count(Some(&path)), 0);
        let report = detect(Some(&path))();
        assert!(report.reason.unwrap().contains("accel.json"));
    }

    #[tokio::test]
    async fn the_monitor_answers_from_its_own_thread() {
        let named = || GpuReport {
            source: std::thread::current().name().unwrap_or("").to_owned(),
            ..GpuReport::default()
        };
        let monitor = GpuMonitor::start(move || Box::new(named)).unwrap();
        assert_eq!(monitor.report().await.source, "accelerators");
    }

    #[tokio::test]
    async fn a_driver_that_hangs_delays_nobody_beyond_the_limit() {
        let (release, hang) = std::sync::mpsc::channel::<()>();
        let hanging = move || {
            let _ = hang.recv();
            GpuReport::default()
        };
        let monitor = GpuMonitor::start(|| Box::new(hanging)).unwrap();
        let report = monitor.report_within(Duration::from_millis(30)).await;
        assert_eq!(report.reason.as_deref(), Some("the driver does not answer"));
        drop(release);
    }
}
