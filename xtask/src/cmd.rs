//! Running other programs: each one is shown before it runs, and an error names it.

use std::{
    env,
    ffi::{OsStr, OsString},
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use cargo_metadata::{Metadata, MetadataCommand};

/// The longest run of rustup: it has a few megabytes to fetch, and may wait for a silent network.
const RUSTUP_LIMIT: Duration = Duration::from_secs(120);

/// The root of the workspace.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace")
}

/// The cargo that runs this program (cargo says so in the environment), or else the one that is found.
fn cargo_program() -> OsString {
    env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// `cargo SUBCOMMAND` on this workspace, from whatever folder the user is in.
pub(crate) fn cargo(subcommand: &str) -> Command {
    let mut command = Command::new(cargo_program());
    command.arg(subcommand).arg("--manifest-path").arg(root().join("Cargo.toml"));
    command
}

/// The workspace's packages and folders, as cargo sees them.
pub(crate) fn metadata() -> Result<Metadata> {
    Ok(MetadataCommand::new().manifest_path(root().join("Cargo.toml")).no_deps().exec()?)
}

/// The folder of all that is built.
pub(crate) fn target_directory() -> Result<PathBuf> {
    Ok(metadata()?.target_directory.into_std_path_buf())
}

/// Runs to the end, with this program's own output.
///
/// # Errors
/// When it cannot be started or does not exit with 0.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let mut child = start(command)?;
    check(command, child.wait()?)
}

/// Like [`run`], but ends the program after `limit`: for what waits on a network.
pub(crate) fn run_within(command: &mut Command, limit: Duration) -> Result<()> {
    let mut child = start(command)?;
    let status = wait_within(command, &mut child, limit)?;
    check(command, status)
}

/// Like [`run`], and gives each line of the program's standard output to `read` as it passes through.
pub(crate) fn run_lines(command: &mut Command, mut read: impl FnMut(&str)) -> Result<()> {
    let mut child = start(command.stdout(Stdio::piped()))?;
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).split(b'\n') {
            let line = line?;
            let line = String::from_utf8_lossy(&line);
            println!("{line}");
            read(&line);
        }
    }
    check(command, child.wait()?)
}

/// Runs for at most `limit` and returns what the program wrote to its standard output; its standard error is part of the
/// error, if it fails.
///
/// # Errors
/// As [`run`], and past the limit.
pub(crate) fn output_within(command: &mut Command, limit: Duration) -> Result<String> {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.with_context(|| cannot_start(command))?;
    // Read on threads of their own: a program that fills one pipe must not be waited for at the other.
    let reader = |pipe: Option<Box<dyn Read + Send>>| {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            // What was read before an error is kept.
            let _ = pipe.map(|mut pipe| pipe.read_to_end(&mut bytes));
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let out = reader(child.stdout.take().map(|pipe| Box::new(pipe) as _));
    let err = reader(child.stderr.take().map(|pipe| Box::new(pipe) as _));
    let status = wait_within(command, &mut child, limit)?;
    let whole = |reader: thread::JoinHandle<String>| reader.join().unwrap_or_default();
    check(command, status).with_context(|| whole(err))?;
    Ok(whole(out))
}

/// Runs to the end and returns what the program wrote to its standard output; its standard error goes to ours.
///
/// # Errors
/// As [`run`], and when the output is not UTF-8.
pub(crate) fn read(command: &mut Command) -> Result<String> {
    let output = command.stderr(Stdio::inherit()).output().with_context(|| cannot_start(command))?;
    check(command, output.status)?;
    String::from_utf8(output.stdout).with_context(|| format!("`{}` printed what is not UTF-8", line(command)))
}

/// Makes sure that `cargo SUBCOMMAND` exists, which the rustup component `component` brings.
///
/// # Errors
/// When it does not exist and rustup cannot add it: how to install it.
pub(crate) fn require_component(subcommand: &str, component: &str) -> Result<()> {
    let mut version = Command::new(cargo_program());
    let exists = version.args([subcommand, "--version"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    if exists.is_ok_and(|status| status.success()) {
        return Ok(());
    }
    let mut rustup = Command::new("rustup");
    // Without its server rustup may panic: the message is enough.
    run_within(rustup.args(["component", "add", component]).env("RUST_BACKTRACE", "0"), RUSTUP_LIMIT)
        .with_context(|| {
            format!(
                "`cargo {subcommand}` is missing: run `rustup component add {component}`, or install the {component} \
                 of this Rust from where it came"
            )
        })
}

/// Waits for the end of a command's process, and ends it after `limit`.
fn wait_within(command: &Command, child: &mut Child, limit: Duration) -> Result<ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            bail!("`{}` had not ended after {} s", line(command), limit.as_secs());
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Shows the command and starts it.
fn start(command: &mut Command) -> Result<Child> {
    eprintln!("$ {}", line(command));
    command.spawn().with_context(|| cannot_start(command))
}

fn cannot_start(command: &Command) -> String {
    format!("cannot start `{}`", line(command))
}

fn check(command: &Command, status: ExitStatus) -> Result<()> {
    ensure!(status.success(), "`{}` ended with {status}", line(command));
    Ok(())
}

/// The command as one could type it, the environment it sets included.
fn line(command: &Command) -> String {
    let variables = command
        .get_envs()
        .filter_map(|(name, value)| value.map(|value| format!("{}={}", name.display(), word(value))));
    let words = std::iter::once(command.get_program()).chain(command.get_args()).map(word);
    variables.chain(words).collect::<Vec<_>>().join(" ")
}

/// One word of a command line, quoted where it must be.
fn word(text: &OsStr) -> String {
    let text = text.to_string_lossy();
    if !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || "-_./=+,:@".contains(c)) {
        text.into_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shown_command_can_be_typed() {
        let mut command = Command::new("rustc");
        command.env("RUSTC_BOOTSTRAP", "1").args(["--cfg", "a b", "it's", ""]);
        assert_eq!(line(&command), r"RUSTC_BOOTSTRAP=1 rustc --cfg 'a b' 'it'\''s' ''");
    }

    #[test]
    fn an_error_names_the_command_and_how_it_ended() {
        let error = run(Command::new("sh").args(["-c", "exit 3"])).unwrap_err().to_string();
        assert_eq!(error, "`sh -c 'exit 3'` ended with exit status: 3");
        let error = run(&mut Command::new("no-such-program")).unwrap_err().to_string();
        assert_eq!(error, "cannot start `no-such-program`");
    }

    #[test]
    fn a_program_past_its_limit_is_ended() {
        let begun = Instant::now();
        let error = run_within(Command::new("sleep").arg("600"), Duration::from_millis(1)).unwrap_err();
        assert_eq!(error.to_string(), "`sleep 600` had not ended after 0 s");
        let error = output_within(Command::new("sleep").arg("600"), Duration::from_millis(1)).unwrap_err();
        assert_eq!(error.to_string(), "`sleep 600` had not ended after 0 s");
        assert!(begun.elapsed() < Duration::from_secs(60));
    }

    #[test]
    fn what_a_program_says_is_returned_or_part_of_the_error() {
        let shell = |script| output_within(Command::new("sh").args(["-c", script]), Duration::from_secs(60));
        assert_eq!(shell("echo this; echo that >&2").unwrap(), "this\n");
        let error = format!("{:#}", shell("echo this; echo that >&2; exit 3").unwrap_err());
        assert_eq!(error, "that\n: `sh -c 'echo this; echo that >&2; exit 3'` ended with exit status: 3");
    }
}
