//! The user's vLLM flags: what they mean for the sidecar, and which process gets them.
//!
//! `vllm serve --headless` uses the same parser as the API server, so it *accepts* the API server's
//! flags; it refuses `--api-server-count` above 0 and `--grpc-port`, and with `--grpc` it does not
//! become an engine at all (`vllm/entrypoints/cli/serve.py`, `launchers/cli_args.py` 0.32.0). All
//! flags of the API server therefore go to the frontend only; that also keeps `--api-key` out of the
//! engines' command lines.

use thiserror::Error;

/// How many values follow a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arity {
    None,
    One,
    /// One or more, up to the next flag.
    Many,
}

use Arity::{Many, None as Switch, One};

/// Flags that only the API server uses (`FrontendArgs` of vLLM 0.32.0, and what `make_arg_parser`
/// adds). Switches also exist as `--no-<name>`.
const FRONTEND_FLAGS: &[(&str, Arity)] = &[
    ("--api-server-count", One),
    ("--lora-modules", Many),
    ("--chat-template", One),
    ("--chat-template-content-format", One),
    ("--trust-request-chat-template", Switch),
    ("--trust-request-mm-kwargs", Switch),
    ("--default-chat-template-kwargs", One),
    ("--response-role", One),
    ("--return-tokens-as-token-ids", Switch),
    ("--enable-auto-tool-choice", Switch),
    ("--exclude-tools-when-tool-choice-none", Switch),
    ("--tool-call-parser", One),
    ("--tool-parser-plugin", One),
    ("--tool-strict-level", One),
    ("--tool-server", One),
    ("--max-log-len", One),
    ("--enable-prompt-tokens-details", Switch),
    ("--enable-per-request-metrics", Switch),
    ("--enable-server-load-tracking", Switch),
    ("--enable-force-include-usage", Switch),
    ("--sse-keep-alive-interval", One),
    ("--enable-tokenizer-info-endpoint", Switch),
    ("--enable-log-outputs", Switch),
    ("--enable-log-deltas", Switch),
    ("--cohere-is-reasoning-model", Switch),
    ("--cohere-format", One),
    ("--anthropic-disabled-thinking-effort", One),
    ("--log-error-stack", Switch),
    ("--tokens-only", Switch),
    ("--enable-scale-out", Switch),
    ("--fingerprint-mode", One),
    ("--fingerprint-value", One),
    ("--host", One),
    ("--port", One),
    ("--grpc-port", One),
    ("--uds", One),
    ("--uvicorn-log-level", One),
    ("--disable-uvicorn-access-log", Switch),
    ("--disable-access-log-for-endpoints", One),
    ("--allow-credentials", Switch),
    ("--allowed-origins", One),
    ("--allowed-methods", One),
    ("--allowed-headers", One),
    ("--api-key", Many),
    ("--ssl-keyfile", One),
    ("--ssl-certfile", One),
    ("--ssl-ca-certs", One),
    ("--enable-ssl-refresh", Switch),
    ("--ssl-cert-reqs", One),
    ("--ssl-ciphers", One),
    ("--root-path", One),
    ("--middleware", One),
    ("--enable-request-id-headers", Switch),
    ("--disable-fastapi-docs", Switch),
    ("--h11-max-incomplete-event-size", One),
    ("--h11-max-header-count", One),
    ("--enable-offline-docs", Switch),
];

/// Flags the sidecar sets itself. The user's must agree.
const MANAGED_FLAGS: &[&str] = &[
    "--data-parallel-size",
    "--data-parallel-size-local",
    "--data-parallel-start-rank",
    "--data-parallel-address",
    "--data-parallel-rpc-port",
];

/// Flags that cannot be used with hosted engines, and why.
const REFUSED_FLAGS: &[(&str, &str)] = &[
    ("--data-parallel-rank", "external load balancing has no place in front of hosted engines"),
    ("--data-parallel-hybrid-lb", "the sidecar's frontends balance over all ranks"),
    ("--data-parallel-external-lb", "the sidecar's frontends balance over all ranks"),
    ("--data-parallel-multi-port-external-lb", "the sidecar's frontends balance over all ranks"),
    ("--data-parallel-supervisor-port", "it belongs to --data-parallel-multi-port-external-lb"),
    ("--headless", "the sidecar decides which processes are headless"),
    ("--grpc", "vLLM starts no engine with it"),
    ("--nnodes", "replicas over several nodes are not supported yet"),
    ("--node-rank", "replicas over several nodes are not supported yet"),
    ("--device-ids", "give it before `--`: the sidecar divides the devices among the ranks"),
    ("--enable-elastic-ep", "the sidecar does not scale a group while it runs"),
];

/// vLLM's multi-letter short forms of flags that matter here (`vllm/engine/arg_utils.py` 0.32.0).
pub const SHORT_FORMS: &[(&str, &str)] = &[
    ("-dp", "--data-parallel-size"),
    ("-dpn", "--data-parallel-rank"),
    ("-dpr", "--data-parallel-start-rank"),
    ("-dpl", "--data-parallel-size-local"),
    ("-dpa", "--data-parallel-address"),
    ("-dpp", "--data-parallel-rpc-port"),
    ("-dpb", "--data-parallel-backend"),
    ("-dph", "--data-parallel-hybrid-lb"),
    ("-dpe", "--data-parallel-external-lb"),
    ("-dpm", "--data-parallel-multi-port-external-lb"),
    ("-asc", "--api-server-count"),
    ("-tp", "--tensor-parallel-size"),
    ("-pp", "--pipeline-parallel-size"),
    ("-pcp", "--prefill-context-parallel-size"),
    ("-n", "--nnodes"),
    ("-r", "--node-rank"),
];

/// The flags after `--` make no sense.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FlagError {
    /// Cannot be used.
    #[error("vLLM flag {flag}: cannot be used with hosted engines: {why}")]
    Refused { flag: String, why: String },
    /// Has no value.
    #[error("vLLM flag {flag}: a value is expected after it")]
    NoValue { flag: String },
    /// Its value cannot be read.
    #[error("vLLM flag {flag}: {expected} expected, found {found:?}")]
    BadValue { flag: String, expected: &'static str, found: String },
}

/// The user's vLLM flags, taken apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VllmFlags {
    /// The model, as given.
    pub model: Option<String>,
    /// Flags for every engine, and for the frontend, too: parallel and model flags must be the same.
    pub common: Vec<String>,
    /// Flags for the frontend only.
    pub frontend: Vec<String>,
    /// Managed flags that the user gave as well, with their values.
    pub managed: Vec<(&'static str, String)>,
    /// `--host`, if given.
    pub host: Option<String>,
    /// `--port`, if given.
    pub port: Option<u16>,
    /// `--api-server-count`, if given.
    pub api_server_count: Option<u32>,
    /// Processes (devices) of one rank: TP x PP x PCP.
    pub world_size: u32,
    /// `--revision`, if given.
    pub revision: Option<String>,
    /// `--config` or `--hf-overrides` or the like: the model cannot be judged by its files alone.
    pub model_overrides: Option<String>,
}

impl VllmFlags {
    /// Takes `[MODEL] [flags]` apart.
    pub fn parse(args: &[String]) -> Result<Self, FlagError> {
        let mut parsed = Self { world_size: 1, ..Self::default() };
        let mut rest = args;
        if let Some((first, tail)) = args.split_first()
            && !first.starts_with('-')
        {
            parsed.model = Some(first.clone());
            rest = tail;
        }
        while let Some((token, tail)) = rest.split_first() {
            let (name, inline) = flag_name(token);
            let following = tail.iter().take_while(|value| !looks_like_flag(value)).count();
            let used = parsed.take_flag(token, &name, inline, &tail[..following])?;
            rest = &tail[used..];
        }
        Ok(parsed)
    }

    /// Takes one flag; returns how many of the `following` values belong to it.
    fn take_flag(
        &mut self,
        token: &str,
        name: &str,
        inline: Option<&str>,
        following: &[String],
    ) -> Result<usize, FlagError> {
        let positive = name.replacen("--no-", "--", 1);
        if let Some((_, why)) = REFUSED_FLAGS.iter().find(|(flag, _)| *flag == name || *flag == positive) {
            return Err(FlagError::Refused { flag: name.to_owned(), why: (*why).to_owned() });
        }
        let value = || {
            inline
                .or_else(|| following.first().map(String::as_str))
                .ok_or_else(|| FlagError::NoValue { flag: name.to_owned() })
        };
        let one = usize::from(inline.is_none());
        if let Some(managed) = MANAGED_FLAGS.iter().find(|flag| **flag == name) {
            self.managed.push((managed, value()?.to_owned()));
            return Ok(one);
        }
        match name {
            "--data-parallel-backend" | "--distributed-executor-backend"
                if matches!(value()?, "ray" | "external_launcher") =>
            {
                return Err(FlagError::Refused {
                    flag: format!("{name} {}", value()?),
                    why: "engines are processes of this node".to_owned(),
                });
            }
            _ if name.starts_with("--data-parallel-") && name != "--data-parallel-backend" => {
                return Err(FlagError::Refused {
                    flag: name.to_owned(),
                    why: "not a flag of vLLM 0.32.0 by its full name".to_owned(),
                });
            }
            "--model" => {
                self.model = Some(value()?.to_owned());
                return Ok(one);
            }
            "--tensor-parallel-size" | "--pipeline-parallel-size" | "--prefill-context-parallel-size" => {
                self.world_size = self.world_size.saturating_mul(number(name, value()?)?);
            }
            "--revision" => self.revision = Some(value()?.to_owned()),
            "--config" | "--hf-overrides" | "--hf-config-path" | "--config-format" => {
                self.model_overrides = Some(name.to_owned());
            }
            "--host" => {
                self.host = Some(value()?.to_owned());
                return Ok(one);
            }
            "--port" => {
                self.port = Some(number(name, value()?)?);
                return Ok(one);
            }
            "--api-server-count" => {
                self.api_server_count = Some(number(name, value()?)?);
                return Ok(one);
            }
            _ => {}
        }
        let arity = FRONTEND_FLAGS
            .iter()
            .find(|(flag, _)| *flag == name || *flag == positive)
            .map(|(_, arity)| *arity);
        let (list, used) = match arity {
            Some(Switch) => (&mut self.frontend, 0),
            Some(One) => {
                value()?;
                (&mut self.frontend, one)
            }
            Some(Many) => (&mut self.frontend, if inline.is_some() { 0 } else { following.len() }),
            // Whatever follows a flag we do not know goes with it.
            None => (&mut self.common, following.len()),
        };
        list.push(token.to_owned());
        list.extend_from_slice(&following[..used]);
        Ok(used)
    }
}

fn number<T: std::str::FromStr>(flag: &str, value: &str) -> Result<T, FlagError> {
    value.parse().map_err(|_| FlagError::BadValue {
        flag: flag.to_owned(),
        expected: "a number",
        found: value.to_owned(),
    })
}

/// The full name of a flag as vLLM reads it (short forms written out, underscores as dashes), and
/// the value after `=`.
pub fn flag_name(token: &str) -> (String, Option<&str>) {
    let (name, value) = match token.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (token, None),
    };
    let long = SHORT_FORMS.iter().find(|(short, _)| *short == name).map(|(_, long)| (*long).to_owned());
    (long.unwrap_or_else(|| name.replace('_', "-")), value)
}

/// Whether argparse takes a token for a flag: negative numbers are values.
fn looks_like_flag(token: &str) -> bool {
    token.len() > 1 && token.starts_with('-') && token.parse::<f64>().is_err()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    fn parse(line: &str) -> Result<VllmFlags, FlagError> {
        VllmFlags::parse(&args(line))
    }

    #[test]
    fn flags_of_the_api_server_go_to_the_frontend_only() {
        let flags = parse(
            "tiny --max-model-len 256 --api-key a b --enforce-eager --uvicorn-log-level=debug \
             --no-enable-log-deltas --served-model-name x y --middleware m -tp 2 \
             --pipeline_parallel_size=2",
        )
        .unwrap();
        assert_eq!(flags.model.as_deref(), Some("tiny"));
        assert_eq!(
            flags.common.join(" "),
            "--max-model-len 256 --enforce-eager --served-model-name x y -tp 2 \
             --pipeline_parallel_size=2"
        );
        assert_eq!(
            flags.frontend.join(" "),
            "--api-key a b --uvicorn-log-level=debug --no-enable-log-deltas --middleware m"
        );
        assert_eq!(flags.world_size, 4);
    }

    #[test]
    fn what_the_sidecar_sets_itself_is_taken_out() {
        let flags = parse(
            "tiny -dp 2 --data_parallel_size_local=1 --port 81 --host ::1 -asc 3 \
             --shutdown-timeout 5 --seed -1",
        )
        .unwrap();
        assert_eq!(
            flags.managed,
            [("--data-parallel-size", "2".to_owned()), ("--data-parallel-size-local", "1".to_owned())]
        );
        assert_eq!(flags.port, Some(81));
        assert_eq!(flags.host.as_deref(), Some("::1"));
        assert_eq!(flags.api_server_count, Some(3));
        assert_eq!(flags.common.join(" "), "--shutdown-timeout 5 --seed -1");
        assert!(flags.frontend.is_empty());
    }

    #[test]
    fn modes_that_hosted_engines_do_not_have_are_refused() {
        for line in [
            "m --headless",
            "m -dph",
            "m --no-data-parallel-hybrid-lb",
            "m -dpn 1",
            "m --grpc",
            "m --data-parallel-backend ray",
            "m --distributed-executor-backend=external_launcher",
            "m --data-parallel-siz 2",
            "m -n 2",
            "m --device-ids 0,1",
        ] {
            assert!(matches!(parse(line), Err(FlagError::Refused { .. })), "{line}: {:?}", parse(line));
        }
        assert!(parse("m --data-parallel-backend mp").is_ok());
    }

    #[test]
    fn a_flag_without_its_value_is_named() {
        assert_eq!(
            parse("m --port --enforce-eager").unwrap_err().to_string(),
            "vLLM flag --port: a value is expected after it"
        );
        assert_eq!(
            parse("m -tp two").unwrap_err().to_string(),
            "vLLM flag --tensor-parallel-size: a number expected, found \"two\""
        );
    }

    #[test]
    fn the_model_may_come_as_a_flag() {
        let flags = parse("--enforce-eager --model=org/name --revision abc").unwrap();
        assert_eq!(flags.model.as_deref(), Some("org/name"));
        assert_eq!(flags.revision.as_deref(), Some("abc"));
        assert_eq!(flags.common.join(" "), "--enforce-eager --revision abc");
    }
}
