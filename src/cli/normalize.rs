//! Makes the command line digestible for clap: vLLM's multi-letter short forms, underscores in
//! names, and `run` as the default subcommand. Nothing after `--` is touched.

use clap::{Arg, CommandFactory as _};

use super::args::Cli;
use crate::supervisor::flags::{SHORT_FORMS, flag_name};

/// Flags of vLLM alone that have no short form.
const VLLM_FLAGS: &[&str] = &["--max-model-len", "--headless"];

/// Whether a flag of vLLM stands where the sidecar's own are: it belongs after `--`.
fn is_misplaced(name: &str) -> bool {
    let of_vllm = SHORT_FORMS.iter().map(|(_, long)| long).chain(VLLM_FLAGS).any(|long| *long == name);
    let is_option = |option: &Arg| {
        let aliases = option.get_all_aliases().unwrap_or_default();
        option.get_long().into_iter().chain(aliases).any(|long| name.strip_prefix("--") == Some(long))
    };
    let command = Cli::command();
    of_vllm && !command.find_subcommand("run").is_some_and(|run| run.get_arguments().any(is_option))
}

/// Rewrites `args` (without the program's name).
pub(super) fn normalize(args: Vec<String>) -> Result<Vec<String>, String> {
    let mut normal = Vec::with_capacity(args.len() + 1);
    let first = args.first().map(String::as_str);
    let named = first.is_some_and(|word| Cli::command().find_subcommand(word).is_some());
    let global = matches!(first, None | Some("-h" | "--help" | "-V" | "--version"));
    if !named && !global {
        normal.push("run".to_owned());
    }
    if first.is_none() {
        normal.push("--help".to_owned());
    }
    let mut args = args.into_iter();
    for arg in args.by_ref() {
        if arg == "--" {
            normal.push(arg);
            break;
        }
        if !arg.starts_with('-') || arg.len() < 2 {
            normal.push(arg);
            continue;
        }
        let (name, value) = flag_name(&arg);
        if is_misplaced(&name) {
            return Err(format!("{arg}: this is a vLLM flag; give it after `--` and the model"));
        }
        match value {
            Some(value) => normal.push(format!("{name}={value}")),
            None => normal.push(name),
        }
    }
    normal.extend(args);
    Ok(normal)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normal(line: &str) -> String {
        let args = line.split_whitespace().map(str::to_owned).collect();
        normalize(args).unwrap().join(" ")
    }

    #[test]
    fn vllms_short_forms_are_written_out() {
        assert_eq!(
            normal("-dpr 0 -dp 2 -dpl=1 -dpa 127.0.0.1 -dpp 7000 -asc 2"),
            "run --data-parallel-start-rank 0 --data-parallel-size 2 \
             --data-parallel-size-local=1 --data-parallel-address 127.0.0.1 \
             --data-parallel-rpc-port 7000 --api-server-count 2"
        );
    }

    #[test]
    fn nothing_behind_the_dashes_is_touched() {
        assert_eq!(
            normal("--dp_rank 0 -- model -dp 2 --max_model_len 8 -- x"),
            "run --dp-rank 0 -- model -dp 2 --max_model_len 8 -- x"
        );
    }

    #[test]
    fn a_named_subcommand_stays() {
        assert_eq!(normal("status --json"), "status --json");
        assert_eq!(normal("run -dp 1"), "run --data-parallel-size 1");
        assert_eq!(normal("--help"), "--help");
        assert_eq!(normal(""), "--help");
    }

    #[test]
    fn a_vllm_flag_in_the_wrong_place_is_told_so() {
        let error = normalize(vec!["-tp".to_owned(), "2".to_owned()]).unwrap_err();
        assert!(error.contains("after `--`"), "{error}");
    }
}
