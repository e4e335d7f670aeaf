//! Options that are given as variables.

use clap::CommandFactory as _;

use super::args::Cli;

/// Variables of options of `run` that Kubernetes has set for a service of this name: `SIDECAR_PORT=tcp://10.0.0.1:80`
/// for one that is called `sidecar`. They are not meant for us.
pub(super) fn of_kubernetes(variable: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let command = Cli::command();
    let options = command.find_subcommand("run").into_iter().flat_map(clap::Command::get_arguments);
    let names = options.filter_map(|option| option.get_env()?.to_str().map(str::to_owned));
    names.filter(|name| variable(name).is_some_and(|value| value.contains("://"))).collect()
}

/// The command line, without these variables.
pub(super) fn command_without(variables: &[String]) -> clap::Command {
    Cli::command().mut_subcommand("run", |run| {
        run.mut_args(|option| {
            let ignored = option.get_env().and_then(|env| env.to_str());
            if ignored.is_some_and(|name| variables.iter().any(|variable| variable == name)) {
                option.env(None::<&str>)
            } else {
                option
            }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_option_of_run_has_its_variable() {
        let command = Cli::command();
        let run = command.find_subcommand("run").unwrap();
        for argument in run.get_arguments() {
            let Some(long) = argument.get_long() else {
                continue;
            };
            if ["help", "dry-run"].contains(&long) {
                continue;
            }
            let expected = format!("SIDECAR_{}", long.to_uppercase().replace('-', "_"));
            assert_eq!(argument.get_env().and_then(|env| env.to_str()), Some(expected.as_str()));
        }
    }
}
