//! The command line of `vllm serve`, as far as the fakes need it. Flags that they do not know are
//! skipped, with a value if one follows.

use std::path::PathBuf;

/// `vllm serve MODEL ...`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServeCommand {
    /// MODEL.
    pub model: Option<PathBuf>,
    /// `--headless`.
    pub headless: bool,
    /// `--data-parallel-size`, `-dp`.
    pub size: u16,
    /// `--data-parallel-size-local`, `-dpl`.
    pub size_local: Option<u16>,
    /// `--data-parallel-start-rank`, `-dpr`.
    pub start_rank: u16,
    /// `--data-parallel-address`, `-dpa`.
    pub address: String,
    /// `--data-parallel-rpc-port`, `-dpp`.
    pub rpc_port: u16,
    /// `--api-server-count`, `-asc`.
    pub api_servers: u16,
    /// `--host`.
    pub host: Option<String>,
    /// `--port`.
    pub port: u16,
}

impl ServeCommand {
    /// Reads the arguments after `serve`.
    pub fn parse(args: &[String]) -> Result<Self, String> {
        let mut command = Self {
            size: 1,
            address: "127.0.0.1".to_owned(),
            rpc_port: 29550,
            api_servers: 1,
            port: 8000,
            ..Self::default()
        };
        let mut args = args.iter().peekable();
        if let Some(model) = args.next_if(|arg| !arg.starts_with('-')) {
            command.model = Some(PathBuf::from(model));
        }
        while let Some(arg) = args.next() {
            let (flag, mut value) = match arg.split_once('=') {
                Some((flag, value)) if flag.starts_with("--") => (flag, Some(value.to_owned())),
                _ => (arg.as_str(), None),
            };
            if flag == "--headless" {
                command.headless = true;
                continue;
            }
            if value.is_none() {
                value = args.next_if(|arg| !arg.starts_with('-')).cloned();
            }
            let text = || value.clone().ok_or_else(|| format!("{flag} needs a value"));
            let number = || text()?.parse::<u16>().map_err(|error| format!("{flag}: {error}"));
            match flag {
                "--model" => command.model = Some(PathBuf::from(text()?)),
                "--data-parallel-size" | "-dp" => command.size = number()?,
                "--data-parallel-size-local" | "-dpl" => command.size_local = Some(number()?),
                "--data-parallel-start-rank" | "-dpr" => command.start_rank = number()?,
                "--data-parallel-address" | "-dpa" => command.address = text()?,
                "--data-parallel-rpc-port" | "-dpp" => command.rpc_port = number()?,
                "--api-server-count" | "-asc" => command.api_servers = number()?,
                "--host" => command.host = Some(text()?),
                "--port" => command.port = number()?,
                _ => {}
            }
        }
        Ok(command)
    }

    /// How many engines this command starts.
    pub fn local(&self) -> u16 {
        self.size_local.unwrap_or(self.size)
    }

    /// Handshake address.
    pub fn handshake(&self) -> String {
        if self.address.contains(':') {
            format!("tcp://[{}]:{}", self.address, self.rpc_port)
        } else {
            format!("tcp://{}:{}", self.address, self.rpc_port)
        }
    }

    /// Is MODEL a mixture of experts, by its `config.json`?
    pub fn moe(&self) -> bool {
        let config = self
            .model
            .as_ref()
            .and_then(|model| std::fs::read(model.join("config.json")).ok())
            .and_then(|text| serde_json::from_slice::<serde_json::Value>(&text).ok());
        let experts = |key: &str| {
            config.as_ref().and_then(|config| config[key].as_u64()).is_some_and(|count| count > 1)
        };
        ["num_experts", "num_local_experts", "n_routed_experts"].into_iter().any(experts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> ServeCommand {
        let args: Vec<String> = line.split(' ').map(str::to_owned).collect();
        ServeCommand::parse(&args).unwrap()
    }

    #[test]
    fn long_short_and_glued_forms_mean_the_same() {
        let long = parse(
            "m --headless --data-parallel-size 4 --data-parallel-size-local 1 \
             --data-parallel-start-rank 2 --data-parallel-address 127.0.0.2 --data-parallel-rpc-port 7000",
        );
        let short = parse("m --headless -dp 4 -dpl 1 -dpr 2 -dpa 127.0.0.2 -dpp 7000");
        let glued = parse(
            "m --headless --data-parallel-size=4 --data-parallel-size-local=1 \
             --data-parallel-start-rank=2 --data-parallel-address=127.0.0.2 --data-parallel-rpc-port=7000",
        );
        assert_eq!(long, short);
        assert_eq!(long, glued);
        assert_eq!(long.start_rank, 2);
        assert_eq!(long.handshake(), "tcp://127.0.0.2:7000");
    }

    #[test]
    fn unknown_flags_are_skipped_with_their_values() {
        let command = parse("m --enforce-eager --dtype bfloat16 --seed=3 --headless -dp 2");
        assert!(command.headless);
        assert_eq!(command.size, 2);
        assert_eq!(command.model, Some(PathBuf::from("m")));
    }
}
