//! The startup handshake: HELLO, INIT, READY (channel H), and the ready response with which an
//! engine registers at each client's input socket.
//!
//! All are msgpack maps. Mirrors `vllm/v1/engine/core.py` (`startup_handshake`,
//! `_perform_handshake`), `vllm/v1/engine/utils.py` (`EngineHandshakeMetadata`) and
//! `vllm/v1/engine/__init__.py` (`EngineCoreReadyResponse`) of 0.11.0 to 0.33.0. Unknown keys are
//! ignored, as vLLM does.

use bytes::Bytes;
use rmpv::Value;
use serde::{Deserialize, Serialize, Serializer};

use crate::error::DecodeError;
use crate::layout::Layout;
use crate::positional::{Kind, ScanError, Scanner};
use crate::write;

/// First message of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The engine runs on the node of the frontend it talks to. Declared by its command line, not
    /// measured.
    pub local: bool,
    /// The engine was started by `vllm serve --headless`.
    pub headless: bool,
}

impl Hello {
    /// What `vllm serve --headless` says.
    pub const HEADLESS: Self = Self { local: false, headless: true };

    pub fn encode(&self) -> Bytes {
        let Self { local, headless } = *self;
        write::named(&map([
            ("status", "HELLO".into()),
            ("local", local.into()),
            ("headless", headless.into()),
        ]))
    }
}

/// Last message of an engine on the handshake socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// As in [`Hello`].
    pub local: bool,
    /// As in [`Hello`].
    pub headless: bool,
    /// Number of KV cache blocks; here up to 0.19, later in the ready response.
    pub num_gpu_blocks: Option<u64>,
    /// The frontend's stats address from INIT; here up to 0.19, later in the ready response.
    pub dp_stats_address: Option<String>,
    /// vLLM's hash of the parallel flags, from lockstep engines since 0.11.1.
    pub parallel_config_hash: Option<String>,
}

impl Ready {
    /// The message in the form of `layout`: up to 0.19 with `num_gpu_blocks` (0 if unknown) and
    /// `dp_stats_address`.
    pub fn encode(&self, layout: &Layout) -> Bytes {
        let mut entries: Vec<(&str, Value)> = vec![
            ("status", "READY".into()),
            ("local", self.local.into()),
            ("headless", self.headless.into()),
        ];
        if layout.registration_is_empty() {
            entries.push(("num_gpu_blocks", self.num_gpu_blocks.unwrap_or_default().into()));
            entries.push(("dp_stats_address", text(self.dp_stats_address.as_ref())));
        }
        if layout.ready_has_hash() && self.parallel_config_hash.is_some() {
            entries.push(("parallel_config_hash", text(self.parallel_config_hash.as_ref())));
        }
        write::named(&map(entries))
    }
}

/// A message of an engine on the handshake socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineMessage {
    /// It is there.
    Hello(Hello),
    /// It is started.
    Ready(Ready),
}

impl EngineMessage {
    /// Reads either message.
    pub fn decode(frame: &[u8]) -> Result<Self, DecodeError> {
        const NAME: &str = "handshake message";
        let mut status = None;
        let mut ready = Ready::default();
        let (mut local, mut headless) = (None, None);
        read_map(frame, NAME, |key, scanner| {
            match key {
                "status" => status = Some(scanner.str()?),
                "local" => local = Some(scanner.bool()?),
                "headless" => headless = Some(scanner.bool()?),
                "num_gpu_blocks" => {
                    ready.num_gpu_blocks = scanner.optional(|s| s.integer("int of 64 bits"))?;
                }
                "dp_stats_address" => ready.dp_stats_address = read_text(scanner)?,
                "parallel_config_hash" => ready.parallel_config_hash = read_text(scanner)?,
                _ => scanner.skip()?,
            }
            Ok(())
        })?;
        ready.local = local.ok_or_else(|| missing(NAME, "local"))?;
        ready.headless = headless.ok_or_else(|| missing(NAME, "headless"))?;
        match status {
            Some("HELLO") => Ok(Self::Hello(Hello { local: ready.local, headless: ready.headless })),
            Some("READY") => Ok(Self::Ready(ready)),
            Some(other) => Err(DecodeError::Unexpected {
                message: NAME,
                at: "status".to_owned(),
                expected: "HELLO or READY",
                actual: format!("{:?}", other.chars().take(40).collect::<String>()),
            }),
            None => Err(missing(NAME, "status")),
        }
    }
}

/// Socket addresses of INIT (vLLM: `EngineZmqAddresses`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    /// Input sockets, one per client.
    pub inputs: Vec<String>,
    /// Output sockets, same order.
    pub outputs: Vec<String>,
    /// Where the engine subscribes (XSUB) for READY and START_DP_WAVE.
    pub coordinator_input: Option<String>,
    /// Where the engine pushes stats and wave edges.
    pub coordinator_output: Option<String>,
    /// Where frontends hear of load, wave and running. Engines only hand it on.
    // Under this name in the `frontends.json` of earlier sidecars.
    #[serde(alias = "stats")]
    pub frontend_stats_publish_address: Option<String>,
}

/// A value of `parallel_config`. The engine accepts no other type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ConfigValue {
    /// An integer.
    Int(i64),
    Str(String),
    /// Integers, e.g. ports.
    Ints(Vec<i64>),
}

/// Answer to HELLO (vLLM: `EngineHandshakeMetadata`). The engine sets every entry of
/// `parallel_config` as an attribute of its `ParallelConfig`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Init {
    /// Where to connect.
    pub addresses: Addresses,
    /// Empty for dense engines since 0.14: see [`GroupPorts`].
    #[serde(serialize_with = "as_map")]
    pub parallel_config: Vec<(String, ConfigValue)>,
    /// Hash of the parallel flags (0.12.0 and 0.13.0 only, informational).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parallel_config_hash: Option<String>,
}

/// What a lockstep engine needs to find its peers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupPorts {
    /// An address of the node that runs DP rank 0.
    pub master_ip: String,
    /// Fallback when `ports` is used up.
    pub master_port: u16,
    /// Free ports on that node; engines take them from the end: the gloo group of the engine
    /// cores first, then the workers' world group.
    pub ports: Vec<u16>,
    /// `--data-parallel-size`.
    pub size: u16,
}

impl Init {
    /// INIT of an engine that runs alone: a dense engine since 0.14. The DP keys would undo its own
    /// rewrite to a size of one and make its workers wait for peers.
    pub const fn independent(addresses: Addresses) -> Self {
        Self { addresses, parallel_config: Vec::new(), parallel_config_hash: None }
    }

    /// INIT of a lockstep engine. No store is offered (`_coord_store_port` 0): the engines take the
    /// ports of the list.
    pub fn lockstep(addresses: Addresses, group: &GroupPorts, layout: &Layout) -> Self {
        let ports = group.ports.iter().map(|port| i64::from(*port)).collect();
        let mut parallel_config = vec![
            ("data_parallel_master_ip".to_owned(), ConfigValue::Str(group.master_ip.clone())),
            ("data_parallel_master_port".to_owned(), ConfigValue::Int(i64::from(group.master_port))),
            ("_data_parallel_master_port_list".to_owned(), ConfigValue::Ints(ports)),
        ];
        if layout.init_has_coord_store_port() {
            parallel_config.push(("_coord_store_port".to_owned(), ConfigValue::Int(0)));
        }
        parallel_config.push(("data_parallel_size".to_owned(), ConfigValue::Int(i64::from(group.size))));
        Self { addresses, parallel_config, parallel_config_hash: None }
    }

    /// A value of `parallel_config`.
    pub fn config(&self, key: &str) -> Option<&ConfigValue> {
        self.parallel_config.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    /// The DP size a frontend names, if it names one (lockstep only).
    pub fn data_parallel_size(&self) -> Option<i64> {
        match self.config("data_parallel_size") {
            Some(ConfigValue::Int(size)) => Some(*size),
            _ => None,
        }
    }

    /// The message: this, as a map.
    pub fn encode(&self) -> Bytes {
        write::named(self)
    }

    /// Reads a frontend's INIT as strictly as an engine does. Fails if the address lists differ in
    /// length or are empty.
    pub fn decode(frame: &[u8]) -> Result<Self, DecodeError> {
        const NAME: &str = "INIT";
        let mut addresses = None;
        let mut parallel_config = None;
        let mut parallel_config_hash = None;
        read_map(frame, NAME, |key, scanner| {
            match key {
                "addresses" => addresses = Some(read_addresses(scanner)?),
                "parallel_config" => parallel_config = Some(read_config(scanner)?),
                "parallel_config_hash" => parallel_config_hash = read_text(scanner)?,
                _ => scanner.skip()?,
            }
            Ok(())
        })?;
        let addresses = addresses.ok_or_else(|| missing(NAME, "addresses"))?;
        if addresses.inputs.is_empty() || addresses.inputs.len() != addresses.outputs.len() {
            return Err(DecodeError::Unexpected {
                message: NAME,
                at: "addresses".to_owned(),
                expected: "as many inputs as outputs, at least one",
                actual: format!("{} inputs, {} outputs", addresses.inputs.len(), addresses.outputs.len()),
            });
        }
        Ok(Self {
            addresses,
            parallel_config: parallel_config.ok_or_else(|| missing(NAME, "parallel_config"))?,
            parallel_config_hash,
        })
    }
}

fn as_map<S: Serializer>(entries: &[(String, ConfigValue)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(entries.iter().map(|(key, value)| (key, value)))
}

fn map<'a>(entries: impl IntoIterator<Item = (&'a str, Value)>) -> Value {
    Value::Map(entries.into_iter().map(|(key, value)| (key.into(), value)).collect())
}

/// A string or nil.
fn text(value: Option<&String>) -> Value {
    value.map_or(Value::Nil, |value| value.as_str().into())
}

fn read_addresses(scanner: &mut Scanner<'_>) -> Result<Addresses, ScanError> {
    let mut addresses = Addresses::default();
    for _ in 0..scanner.map()? {
        match scanner.str()? {
            "inputs" => addresses.inputs = read_strings(scanner)?,
            "outputs" => addresses.outputs = read_strings(scanner)?,
            "coordinator_input" => addresses.coordinator_input = read_text(scanner)?,
            "coordinator_output" => addresses.coordinator_output = read_text(scanner)?,
            "frontend_stats_publish_address" => {
                addresses.frontend_stats_publish_address = read_text(scanner)?;
            }
            _ => scanner.skip()?,
        }
    }
    Ok(addresses)
}

pub(crate) fn read_text(scanner: &mut Scanner<'_>) -> Result<Option<String>, ScanError> {
    scanner.optional(|s| s.str().map(str::to_owned))
}

fn read_strings(scanner: &mut Scanner<'_>) -> Result<Vec<String>, ScanError> {
    (0..scanner.array()?).map(|_| scanner.str().map(str::to_owned)).collect()
}

fn read_config(scanner: &mut Scanner<'_>) -> Result<Vec<(String, ConfigValue)>, ScanError> {
    let mut config = Vec::new();
    for _ in 0..scanner.map()? {
        let key = scanner.str()?.to_owned();
        let value = match scanner.kind()? {
            Kind::Str => ConfigValue::Str(scanner.str()?.to_owned()),
            Kind::Array => {
                let count = scanner.array()?;
                let ports: Result<_, _> = (0..count).map(|_| scanner.integer("int of 64 bits")).collect();
                ConfigValue::Ints(ports?)
            }
            _ => ConfigValue::Int(scanner.integer("int, str or list of int")?),
        };
        config.push((key, value));
    }
    Ok(config)
}

fn missing(message: &'static str, at: &str) -> DecodeError {
    DecodeError::Unexpected { message, at: at.to_owned(), expected: "a value", actual: "missing".to_owned() }
}

/// Calls `entry` for each key of the map that fills `frame`; it must take the value.
pub(crate) fn read_map<'a>(
    frame: &'a [u8],
    message: &'static str,
    mut entry: impl FnMut(&'a str, &mut Scanner<'a>) -> Result<(), ScanError>,
) -> Result<(), DecodeError> {
    let mut scanner = Scanner::new(frame);
    let pairs = scanner.map().map_err(|error| error.within(message, "top level"))?;
    for _ in 0..pairs {
        let key = scanner.str().map_err(|error| error.within(message, "key"))?;
        entry(key, &mut scanner).map_err(|error| error.within(message, key))?;
    }
    scanner.finish().map_err(|error| error.within(message, "end"))
}
