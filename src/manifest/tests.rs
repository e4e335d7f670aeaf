use std::collections::BTreeMap;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use dp_sidecar_protocol::machine::weight_update::Fit;
use serde_json::json;

use super::digest::Digests;
use super::*;

/// Writes a safetensors file by hand, so that it can be wrong. Tensors: name, dtype, shape, bytes.
pub(crate) fn write(dir: &Path, file: &str, tensors: &[(&str, &str, &[usize], &[u8])]) {
    let mut header = String::from("{\"__metadata__\":{\"format\":\"pt\"}");
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let start = data.len();
        data.extend_from_slice(bytes);
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]});
        header.push_str(&format!(",{}:{entry}", json!(name)));
    }
    header.push('}');
    let mut all = (header.len() as u64).to_le_bytes().to_vec();
    all.extend_from_slice(header.as_bytes());
    all.extend_from_slice(&data);
    std::fs::write(dir.join(file), all).unwrap();
}

const BIAS: (&str, &str, &[usize], &[u8]) = ("a.bias", "F32", &[2], &[0, 0, 0x80, 0x3f, 0, 0, 0, 0x40]);
const SCALAR: (&str, &str, &[usize], &[u8]) = ("b", "BF16", &[], &[0x80, 0x3f]);

type Raw<'a> = (&'a str, &'a str, &'a [usize], &'a [u8]);

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn digest(path: &Path) -> Digests {
    let manifest = Manifest::read(path, None).unwrap();
    manifest.digests(&|_| {}, &AtomicBool::new(false)).unwrap()
}

fn error(path: &Path) -> String {
    Manifest::read(path, None).unwrap_err().to_string()
}

#[test]
fn the_digest_is_that_of_the_contract_with_the_shim() {
    let dir = dir();
    write(dir.path(), "model.safetensors", &[SCALAR, BIAS]);
    let digests = digest(dir.path());
    // From protocol/docs/weight-update.md, computed in Python.
    assert_eq!(digests.tensors["a.bias"], "83376e7b4f6f582dcb75e173caef357ad07daba8f7d086eb4ee23fb8d699f138");
    assert_eq!(digests.tensors["b"], "26ec6f78b11c047a24fdb290f03420238227035d0519325a8c69044624a31513");
    assert_eq!(digests.whole, "1be5773b02fdc5720476d39d52ead12cd6337b2ec6c46c2fa30c1605fe645988");
    let contract = include_str!("../../protocol/docs/weight-update.md");
    assert!(contract.contains(&digests.whole));
}

#[test]
fn a_named_pipe_is_refused_by_name_and_blocks_nobody() {
    for name in ["model.safetensors", INDEX] {
        let dir = dir();
        let path = dir.path().join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(
            error(dir.path()),
            format!("checkpoint file {}: cannot be read: expected a regular file", path.display())
        );
    }
}

#[test]
fn the_digest_does_not_depend_on_the_files() {
    let (one, two) = (dir(), dir());
    write(one.path(), "model.safetensors", &[BIAS, SCALAR]);
    write(two.path(), "model-00001-of-00002.safetensors", &[SCALAR]);
    write(two.path(), "model-00002-of-00002.safetensors", &[BIAS]);
    assert_eq!(digest(one.path()), digest(two.path()));
    let manifest = Manifest::read(two.path(), None).unwrap();
    assert_eq!((manifest.tensors.len(), manifest.bytes()), (2, 10));
    assert_eq!(
        manifest.checkpoint(None).files,
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    );
}

#[test]
fn a_large_tensor_is_hashed_in_chunks_with_progress() {
    let dir = dir();
    let bytes: Vec<u8> = (0..9_000_001u32).map(|n| (n % 251) as u8).collect();
    write(dir.path(), "model.safetensors", &[("big", "U8", &[9_000_001], &bytes), BIAS]);
    let manifest = Manifest::read(dir.path(), None).unwrap();
    let (calls, last) = (AtomicU64::new(0), AtomicU64::new(0));
    let progress = |progress: Progress| {
        calls.fetch_add(1, Ordering::Relaxed);
        last.fetch_max(progress.done, Ordering::Relaxed);
        assert_eq!(progress.total, 9_000_009);
    };
    let digests = manifest.digests(&progress, &AtomicBool::new(false)).unwrap();
    assert_eq!(digests.tensors["big"], blake3::hash(&bytes).to_hex().to_string());
    assert_eq!(calls.load(Ordering::Relaxed), 4);
    assert_eq!(last.load(Ordering::Relaxed), 9_000_009);
}

#[test]
fn hashing_can_be_called_off() {
    let dir = dir();
    write(dir.path(), "model.safetensors", &[BIAS]);
    let manifest = Manifest::read(dir.path(), None).unwrap();
    let result = manifest.digests(&|_| {}, &AtomicBool::new(true));
    assert!(matches!(result, Err(ManifestError::Cancelled { .. })));
}

#[test]
fn a_file_that_changes_while_it_is_hashed_is_noticed() {
    let dir = dir();
    write(dir.path(), "model.safetensors", &[BIAS]);
    let manifest = Manifest::read(dir.path(), None).unwrap();
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(10);
    let file = File::options().write(true).open(dir.path().join("model.safetensors")).unwrap();
    file.set_modified(later).unwrap();
    let result = manifest.digests(&|_| {}, &AtomicBool::new(false));
    assert!(matches!(result, Err(ManifestError::Changed { .. })));
}

#[test]
fn a_path_that_is_no_directory_is_named() {
    let dir = dir();
    let missing = dir.path().join("nothing");
    assert!(error(&missing).ends_with("nothing: no such directory"));
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    assert!(error(&file).ends_with("file: not a directory"));
    let empty = tempfile::tempdir().unwrap();
    assert!(error(empty.path()).ends_with("no *.safetensors file"));
}

#[test]
fn what_the_model_needs_is_compared_by_name_shape_and_dtype() {
    let (model, new) = (dir(), dir());
    let gone = ("gone", "F32", &[1usize] as &[usize], &[0u8; 4] as &[u8]);
    write(model.path(), "model.safetensors", &[BIAS, SCALAR, gone, ("half", "F16", &[2], &[0; 4])]);
    write(
        new.path(),
        "model.safetensors",
        &[
            ("a.bias", "F32", &[1, 2], &[0; 8]),
            SCALAR,
            ("half", "I16", &[2], &[0; 4]),
            ("extra", "F32", &[0], &[]),
        ],
    );
    let model = Manifest::read(model.path(), None).unwrap();
    let new = Manifest::read(new.path(), None).unwrap();
    let ManifestError::Tensors { faults, .. } = new.check_against(&model, &Fit::default()).unwrap_err()
    else {
        panic!("expected tensor faults")
    };
    let texts: Vec<String> = faults.iter().map(ToString::to_string).collect();
    assert_eq!(
        texts,
        [
            "a.bias has shape [1, 2], expected [2]",
            "half has dtype I16, expected F16: only BF16, F16, F32 and F64 are cast to each other",
            "missing gone",
            "unexpected extra"
        ]
    );
    assert_eq!(model.check_against(&model, &Fit::default()).unwrap(), []);
}

#[test]
fn numbers_are_cast_as_vllm_casts_them_and_formats_are_not() {
    let strict = Fit { strict_dtype: true, ..Fit::default() };
    let of = |dtype: &'static str, length: usize| {
        let dir = dir();
        write(dir.path(), "model.safetensors", &[("w", dtype, &[2], &[0; 16][..2 * length])]);
        Manifest::read(dir.path(), None).unwrap()
    };
    let floats = [of("BF16", 2), of("F16", 2), of("F32", 4), of("F64", 8)];
    for (model, new) in floats.iter().flat_map(|one| floats.iter().map(move |other| (one, other))) {
        new.check_against(model, &Fit::default()).unwrap();
        let (from, to) = (&new.tensors[0].dtype, &model.tensors[0].dtype);
        let refused = new.check_against(model, &strict).err().map(|error| error.to_string());
        let expected = format!("w has dtype {from}, expected {to}: no cast with --strict-dtype");
        assert_eq!(refused.map(|text| text.ends_with(&expected)), (from != to).then_some(true));
    }
    for other in [of("F8_E4M3", 1), of("F8_E5M2", 1), of("U8", 1), of("I8", 1), of("I32", 4), of("BOOL", 1)] {
        for (model, new) in [(&floats[0], &other), (&other, &floats[2])] {
            let error = new.check_against(model, &Fit::default()).unwrap_err().to_string();
            assert!(error.contains("only BF16, F16, F32 and F64 are cast"), "{error}");
        }
        other.check_against(&other, &strict).unwrap();
    }
}

#[test]
fn what_only_one_checkpoint_has_is_left_to_vllms_loader_unless_it_has_said() {
    let (model, new) = (dir(), dir());
    let only = |name: &'static str| (name, "F32", &[1usize] as &[usize], &[0u8; 4] as &[u8]);
    write(model.path(), "model.safetensors", &[SCALAR, only("old"), only("mtp.old")]);
    write(new.path(), "model.safetensors", &[SCALAR, only("mtp.new"), only("new")]);
    let model = Manifest::read(model.path(), None).unwrap();
    let new = Manifest::read(new.path(), None).unwrap();
    let names = |fit: &Fit| {
        let odd = new.check_against(&model, fit).unwrap();
        odd.into_iter().map(|odd| Fault::from(odd).to_string()).collect::<Vec<_>>()
    };
    let fit = Fit::default();
    assert_eq!(names(&fit), ["missing mtp.old", "missing old", "unexpected mtp.new", "unexpected new"]);
    let ignored = ["mtp.old", "mtp.new", "b"].map(str::to_owned).into();
    assert_eq!(names(&Fit { ignored, ..fit }), ["missing old", "unexpected new"]);
    let all = Manifest { tensors: Vec::new(), ..new.clone() };
    assert_eq!(all.check_against(&model, &Fit::default()).unwrap().len(), 3);
}

#[test]
fn a_tied_copy_may_be_there_or_not_and_is_equal() {
    let embedding = ("model.embed.weight", "U8", &[2usize] as &[usize], &[1u8, 2] as &[u8]);
    let head = |bytes: &'static [u8]| ("lm_head.weight", "U8", &[2usize] as &[usize], bytes);
    let narrow = ("lm_head.weight", "I8", &[2usize] as &[usize], &[1u8, 2] as &[u8]);
    let with: [(&str, &[Raw<'_>]); 5] = [
        ("none", &[embedding]),
        ("equal", &[embedding, head(&[1, 2])]),
        ("other", &[embedding, head(&[1, 3])]),
        ("dtype", &[embedding, narrow]),
        ("alone", &[head(&[1, 2])]),
    ];
    let dirs = with.map(|(name, tensors)| {
        let dir = dir();
        write(dir.path(), "model.safetensors", tensors);
        (name, Manifest::read(dir.path(), None).unwrap(), dir)
    });
    // vLLM's names have another prefix, and those of wrapped layers one more part.
    let pair = ("language_model.lm_head.base_layer.weight".to_owned(), "model.embed.weight".to_owned());
    let tied = Fit { tied: vec![pair], ..Fit::default() };
    let judged = |model: &Manifest, new: &Manifest, fit: &Fit| -> String {
        let odd = new.check_against(model, fit).map_err(|error| error.to_string());
        let files = new.open().unwrap();
        let same = new.check_copies(model, fit, |tensor, at, buffer| {
            files[tensor.file].read_exact_at(buffer, tensor.start + at).unwrap();
            Ok(())
        });
        let odd = odd.and_then(|odd| if odd.is_empty() { Ok(()) } else { Err(format!("{odd:?}")) });
        odd.and_then(|()| same.map_err(|error| error.to_string())).err().unwrap_or_default()
    };
    for (model, model_manifest, _) in &dirs[..2] {
        for (new, manifest, _) in &dirs {
            let text = judged(model_manifest, manifest, &tied);
            let expected = match *new {
                "none" | "equal" => text.is_empty(),
                "alone" => text.contains("model.embed.weight") && text.contains("missing: true"),
                _ => {
                    text.contains("lm_head.weight differs from model.embed.weight: the model has them as one")
                }
            };
            assert!(expected, "{new} over {model}: {text}");
            if model != new {
                let untied = judged(model_manifest, manifest, &Fit::default());
                assert!(
                    untied.contains("weight") || (*model, *new) == ("equal", "other"),
                    "{new} over {model}: {untied}"
                );
            }
        }
    }
}

#[test]
fn a_long_list_of_faults_is_cut() {
    let (model, new) = (dir(), dir());
    let names: Vec<String> = (0..20).map(|n| format!("t{n:02}")).collect();
    let tensors: Vec<_> =
        names.iter().map(|name| (name.as_str(), "U8", &[1usize] as &[usize], &[0u8] as &[u8])).collect();
    write(model.path(), "model.safetensors", &tensors);
    write(new.path(), "model.safetensors", &tensors[..1]);
    let model = Manifest::read(model.path(), None).unwrap();
    let new = Manifest::read(new.path(), None).unwrap();
    let odd = new.check_against(&model, &Fit::default()).unwrap();
    let text = ManifestError::odd(&new.path, odd, None).to_string();
    assert!(text.contains("19 tensor faults: missing t01; missing t02"), "{text}");
    assert!(text.ends_with("missing t08; and 11 more"), "{text}");
}

#[test]
fn a_tensor_that_is_there_twice_is_refused() {
    let dir = dir();
    write(dir.path(), "a.safetensors", &[BIAS]);
    write(dir.path(), "b.safetensors", &[BIAS]);
    assert!(error(dir.path()).contains("duplicate a.bias (in a.safetensors and b.safetensors)"));
    std::fs::remove_file(dir.path().join("b.safetensors")).unwrap();
    write(dir.path(), "a.safetensors", &[BIAS, BIAS]);
    assert!(error(dir.path()).contains("duplicate a.bias (in a.safetensors and a.safetensors)"));
}

#[test]
fn a_truncated_or_too_long_file_is_refused() {
    let dir = dir();
    write(dir.path(), "model.safetensors", &[BIAS, SCALAR]);
    let path = dir.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for cut in [whole.len() - 1, whole.len() - 9, 20, 8, 7, 0] {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let error = Manifest::read(dir.path(), None).unwrap_err();
        let ManifestError::Length { actual, .. } = error else { panic!("cut at {cut}: {error}") };
        assert_eq!(actual, cut as u64);
    }
    let mut long = whole.clone();
    long.push(0);
    std::fs::write(&path, &long).unwrap();
    assert!(matches!(Manifest::read(dir.path(), None), Err(ManifestError::Length { .. })));
}

#[test]
fn garbage_is_refused_whatever_it_is() {
    let dir = dir();
    let path = dir.path().join("model.safetensors");
    let mut huge = u64::MAX.to_le_bytes().to_vec();
    huge.push(b'{');
    let with_header = |header: &str, data: &[u8]| {
        let mut all = (header.len() as u64).to_le_bytes().to_vec();
        all.extend_from_slice(header.as_bytes());
        all.extend_from_slice(data);
        all
    };
    let cases = [
        ("huge header", huge),
        ("not json", with_header("nonsense", &[])),
        ("array", with_header("[]", &[])),
        ("unknown dtype", with_header(r#"{"a":{"dtype":"F7","shape":[1],"data_offsets":[0,4]}}"#, &[0; 4])),
        ("wrong size", with_header(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, &[0; 4])),
        (
            "overflow",
            with_header(r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#, &[]),
        ),
        ("hole", with_header(r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#, &[0; 2])),
        ("backwards", with_header(r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}}"#, &[0; 2])),
    ];
    for (what, bytes) in cases {
        std::fs::write(&path, bytes).unwrap();
        let result = Manifest::read(dir.path(), None);
        assert!(matches!(result, Err(ManifestError::Header { .. })), "{what}: {result:?}");
    }
}

#[test]
fn every_name_that_a_header_of_100_000_has_twice_is_found() {
    let names = 0..100_000;
    let entry =
        |at: usize| format!(r#""tensor.{at}":{{"dtype":"U8","shape":[1],"data_offsets":[{at},{}]}}"#, at + 1);
    // The second entry of a name covers the same byte, so it does not begin where the one before ends.
    let entries: Vec<String> = names.clone().chain(names.clone()).map(entry).collect();
    let header = format!("{{{}}}", entries.join(","));
    let mut start = (header.len() as u64).to_le_bytes().to_vec();
    start.extend_from_slice(header.as_bytes());
    let length = (start.len() + names.len()) as u64;
    let file = ("model.safetensors", length, &start[..]);
    let error = Manifest::from_headers(Path::new("dir"), [file]).unwrap_err();
    let ManifestError::Tensors { faults, .. } = error else { panic!("{error}") };
    let name = |fault| match fault {
        Fault::Duplicate { name, .. } => name,
        other => panic!("{other}"),
    };
    let faults: Vec<String> = faults.into_iter().map(name).collect();
    let twice: BTreeSet<&String> = faults.iter().collect();
    assert_eq!((faults.len(), twice.len()), (names.len(), names.len()));
}

fn write_index(dir: &Path, entries: &[(&str, &str)]) {
    let map: BTreeMap<&str, &str> = entries.iter().copied().collect();
    let text = json!({"metadata": {}, "weight_map": map}).to_string();
    std::fs::write(dir.join(INDEX), text).unwrap();
}

#[test]
fn an_index_decides_which_files_count_and_must_be_true() {
    let dir = dir();
    write(dir.path(), "x.safetensors", &[BIAS]);
    write(dir.path(), "y.safetensors", &[SCALAR]);
    write(dir.path(), "ignored.safetensors", &[BIAS]);
    write_index(dir.path(), &[("a.bias", "x.safetensors"), ("b", "y.safetensors")]);
    let manifest = Manifest::read(dir.path(), None).unwrap();
    assert_eq!(manifest.files.len(), 2);

    write_index(dir.path(), &[("a.bias", "y.safetensors"), ("b", "y.safetensors")]);
    assert!(error(dir.path()).contains("a.bias is not in y.safetensors, where the index says"));

    write_index(dir.path(), &[("a.bias", "z.safetensors")]);
    assert!(error(dir.path()).ends_with("z.safetensors: cannot be read: no such file"));

    write_index(dir.path(), &[("a.bias", "../x.safetensors")]);
    assert!(matches!(Manifest::read(dir.path(), None), Err(ManifestError::Index { .. })));
    std::fs::write(dir.path().join(INDEX), "{").unwrap();
    assert!(matches!(Manifest::read(dir.path(), None), Err(ManifestError::Index { .. })));
}

#[test]
fn consolidated_files_count_alone_as_for_vllm_and_so_do_those_that_it_names() {
    let dir = dir();
    write(dir.path(), "model.safetensors", &[BIAS]);
    write_index(dir.path(), &[("a.bias", "model.safetensors")]);
    write(dir.path(), "consolidated.safetensors", &[BIAS]);
    let files = |named: Option<&[String]>| {
        let manifest = Manifest::read(dir.path(), named).unwrap();
        manifest.files.into_iter().map(|file| file.name).collect::<Vec<_>>()
    };
    assert_eq!(files(None), ["consolidated.safetensors"]);
    assert_eq!(files(Some(&["model.safetensors".to_owned()])), ["model.safetensors"]);
    let error = Manifest::read(dir.path(), Some(&["pytorch_model.bin".to_owned()])).unwrap_err().to_string();
    assert!(error.contains("pytorch_model.bin: cannot be read: vLLM loads this file; only"), "{error}");
}

#[test]
fn an_adapter_that_does_not_fit_the_model_is_refused() {
    let half = |module: &'static str, half: &'static str, shape: [usize; 2]| {
        let name = format!("base_model.model.{module}.lora_{half}.weight");
        let len = 2 * (shape[0] * shape[1]) as u64;
        Tensor { file: 0, name, dtype: "BF16".to_owned(), shape: shape.to_vec(), start: 0, len }
    };
    let manifest = |tensors| Manifest { path: PathBuf::from("/m"), files: Vec::new(), tensors };
    let weight = |name: &str, dtype: &str| Tensor {
        file: 0,
        name: name.to_owned(),
        dtype: dtype.to_owned(),
        shape: vec![16, 8],
        start: 0,
        len: 0,
    };
    // The shape of a packed weight is not that of the matrix.
    let model = manifest(vec![weight("m.q.weight", "BF16"), weight("m.packed.weight", "U8")]);
    let cases = [
        (vec![half("m.q", "A", [4, 8]), half("m.q", "B", [16, 4])], None),
        (vec![half("m.q", "A", [4, 8])], Some("m.q: has no lora_B")),
        (vec![half("m.q", "B", [16, 4])], Some("m.q: has no lora_A")),
        (
            vec![half("m.q", "A", [4, 8]), half("m.q", "B", [16, 3])],
            Some("m.q: lora_A has rank 4, lora_B has 3"),
        ),
        (
            vec![half("m.q", "A", [4, 8]), half("m.q", "B", [15, 4])],
            Some("m.q: 16 x 8 in the model, 15 x 8 in the adapter"),
        ),
        (
            vec![half("m.q", "A", [4, 9]), half("m.q", "B", [16, 4])],
            Some("m.q: 16 x 8 in the model, 16 x 9 in the adapter"),
        ),
        (vec![half("elsewhere", "A", [4, 9]), half("elsewhere", "B", [1, 4])], None),
        (vec![half("m.packed", "A", [4, 9]), half("m.packed", "B", [1, 4])], None),
    ];
    for (tensors, expected) in cases {
        let adapter = manifest(tensors);
        let fault = adapter.check_adapter(Some(&model)).err().map(|error| error.to_string());
        match expected {
            None => assert_eq!(fault, None),
            Some(text) => assert_eq!(fault, Some(format!("checkpoint /m: 1 tensor fault: {text}"))),
        }
        // Without the model the halves are still compared with each other.
        let alone = adapter.check_adapter(None).is_err();
        assert_eq!(alone, expected.is_some_and(|text| text.contains("lora_")), "{expected:?}");
    }
}
