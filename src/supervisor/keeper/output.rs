//! What a child writes: into its log file, which is cut when it grows, and its last lines in
//! memory, for the report of its end.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, PipeReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use super::read_available;

/// A log file is moved to `<name>.log.1` when it has this many bytes.
pub const LOG_LIMIT: u64 = 32 * 1024 * 1024;
/// Lines kept for the report.
pub const LAST_LINES: usize = 50;
/// Longest kept line; the rest of a line is in the log file only.
const LINE_LIMIT: usize = 2048;
/// Read at most this much from one child before others get their turn.
const TURN: u64 = 256 * 1024;

/// The last lines of a stream of bytes. A carriage return starts the line over, as on a terminal,
/// so that progress bars do not push out what matters.
#[derive(Debug, Default)]
pub struct Tail {
    lines: VecDeque<String>,
    line: Vec<u8>,
    restart: bool,
}

impl Tail {
    /// Takes what was written.
    pub fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            match byte {
                b'\n' => {
                    self.restart = false;
                    self.end_line();
                }
                b'\r' => self.restart = true,
                byte => {
                    if std::mem::take(&mut self.restart) {
                        self.line.clear();
                    }
                    if self.line.len() < LINE_LIMIT {
                        self.line.push(byte);
                    }
                }
            }
        }
    }

    fn end_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        if line.is_empty() {
            return;
        }
        if self.lines.len() == LAST_LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(String::from_utf8_lossy(&line).into_owned());
    }

    /// The lines so far, an unfinished one included.
    pub fn lines(&mut self) -> Vec<String> {
        self.end_line();
        self.lines.iter().cloned().collect()
    }
}

/// A log file of bounded size.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: Option<File>,
    size: u64,
    limit: u64,
    /// Bytes that could not be written since the last ones that could, and why not.
    lost: Option<(u64, io::Error)>,
}

impl LogFile {
    /// Opens the log for appending. A log that cannot be opened or written loses what comes meanwhile, never a child,
    /// and says so once it can be written again.
    pub fn open(path: PathBuf, limit: u64) -> Self {
        let mut log = Self { path, file: None, size: 0, limit, lost: None };
        if let Err(error) = log.reopen() {
            log.lose(0, error);
        }
        log
    }

    fn reopen(&mut self) -> io::Result<()> {
        self.file = None;
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&self.path)?;
        self.size = file.metadata().map_or(0, |metadata| metadata.len());
        self.file = Some(file);
        Ok(())
    }

    /// Appends.
    pub fn write(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        if let Err(error) = self.append(bytes) {
            self.lose(bytes.len() as u64, error);
        }
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.size.saturating_add(bytes.len() as u64) > self.limit && self.size > 0 {
            let old = self.path.with_extension("log.1");
            if let Err(error) = std::fs::rename(&self.path, &old) {
                tracing::warn!(path = %self.path.display(), %error, "log file cannot be moved away");
            }
            self.reopen()?;
        } else if self.file.is_none() {
            self.reopen()?;
        }
        if let Some((lost, why)) = &self.lost {
            let note = format!("\n[keeper] {lost} bytes of output are not here: {why}\n");
            self.put(note.as_bytes())?;
            self.lost = None;
        }
        self.put(bytes)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        if let Some(file) = &mut self.file {
            file.write_all(bytes)?;
            self.size = self.size.saturating_add(bytes.len() as u64);
        }
        Ok(())
    }

    /// The file is opened again for the next bytes: what was wrong may have been set right.
    fn lose(&mut self, bytes: u64, error: io::Error) {
        self.file = None;
        match &mut self.lost {
            Some((lost, _)) => *lost += bytes,
            None => {
                tracing::warn!(path = %self.path.display(), %error, "log file cannot be written");
                self.lost = Some((bytes, error));
            }
        }
    }
}

/// The pipe from a child and where its bytes go.
#[derive(Debug)]
pub struct Output {
    /// Read end; `None` after its end. Non-blocking.
    pub pipe: Option<PipeReader>,
    log: LogFile,
    tail: Tail,
}

impl Output {
    /// Connects a pipe with its log file.
    pub fn new(pipe: PipeReader, log: LogFile) -> Self {
        Self { pipe: Some(pipe), log, tail: Tail::default() }
    }

    /// Reads what is there, a bounded amount.
    pub fn pump(&mut self) {
        let Some(pipe) = &mut self.pipe else {
            return;
        };
        let mut bytes = Vec::new();
        let open = read_available(pipe, TURN, &mut bytes).unwrap_or_else(|error| {
            tracing::warn!(%error, "output of a child cannot be read");
            false
        });
        if !open {
            self.pipe = None;
        }
        self.log.write(&bytes);
        self.tail.push(&bytes);
    }

    /// Writes a line of the keeper's own into the log.
    pub fn note(&mut self, text: &str) {
        self.log.write(format!("[keeper] {text}\n").as_bytes());
    }

    /// The last lines of the child.
    pub fn last_lines(&mut self) -> Vec<String> {
        self.tail.lines()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_keeps_the_last_fifty_lines_and_an_unfinished_one() {
        let mut tail = Tail::default();
        for number in 0..60 {
            tail.push(format!("line {number}\n").as_bytes());
        }
        tail.push(b"\nno newline");
        let lines = tail.lines();
        assert_eq!(lines.len(), LAST_LINES);
        assert_eq!(lines.first().unwrap(), "line 11");
        assert_eq!(lines.last().unwrap(), "no newline");
    }

    #[test]
    fn a_progress_bar_takes_one_line_and_crlf_is_a_line_end() {
        let mut tail = Tail::default();
        tail.push(b"loading 10%\rloading 50%\rloading 100%\nwindows\r\nlast");
        assert_eq!(tail.lines(), ["loading 100%", "windows", "last"]);
    }

    #[test]
    fn a_line_without_end_is_cut_and_broken_utf8_is_replaced() {
        let mut tail = Tail::default();
        tail.push(&vec![b'x'; 10 * LINE_LIMIT]);
        tail.push(b"\n\xff\xfe\n");
        let lines = tail.lines();
        assert_eq!(lines[0].len(), LINE_LIMIT);
        assert_eq!(lines[1], "\u{fffd}\u{fffd}");
    }

    #[test]
    fn a_log_file_is_moved_away_when_it_is_full() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("engine-0.log");
        let mut log = LogFile::open(path.clone(), 100);
        for number in 0..30 {
            log.write(format!("line {number:04}\n").as_bytes());
        }
        let now = std::fs::read_to_string(&path).unwrap();
        let old = std::fs::read_to_string(path.with_extension("log.1")).unwrap();
        assert!(now.len() <= 100 && old.len() <= 100, "{now} {old}");
        assert!(now.ends_with("line 0029\n"));
        assert!(old.ends_with(&format!("line {:04}\n", now[5..9].parse::<u32>().unwrap() - 1)));
    }

    #[test]
    fn a_log_file_goes_on_when_there_is_room_again_and_says_what_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let (path, real) = (dir.path().join("engine-0.log"), dir.path().join("real"));
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
        let mut log = LogFile::open(path.clone(), 1000);
        log.write(b"12345\n");
        log.write(b"678\n");
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&real, &path).unwrap();
        log.write(b"after\n");
        log.write(b"and more\n");
        let text = std::fs::read_to_string(&real).unwrap();
        let [note, rest] = text.trim_start().splitn(2, '\n').collect::<Vec<_>>().try_into().unwrap();
        assert!(note.starts_with("[keeper] 10 bytes of output are not here: No space left"), "{note}");
        assert_eq!(rest, "after\nand more\n");
    }
}
