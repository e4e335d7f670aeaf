//! Uploads: they have the spare segment until an update takes it.

use super::*;

impl Task {
    pub(super) fn session(&self, id: &str) -> Option<Arc<Session>> {
        self.uploads.as_ref()?.sessions.lock().get(id)
    }

    pub(super) fn end_session(&self, id: &str) {
        if let Some(uploads) = &self.uploads {
            uploads.sessions.lock().end(id);
        }
    }

    pub(super) fn begin_upload(&mut self, spec: StageSpec, name: &str) -> Result<()> {
        let session = self.session(name);
        let session = session.ok_or_else(|| self.refused(format!("there is no upload {name:?}")))?;
        let spare = self.uploading.as_mut().filter(|uploading| uploading.id == name);
        let spare = spare.and_then(|uploading| uploading.spare.take());
        let spare = spare.ok_or_else(|| self.refused(format!("upload {name:?} is in use")))?;
        self.start(spec, Origin::Upload(session.fill(), spare), None);
        Ok(())
    }

    /// Takes the segment from an upload that nobody touched for long.
    pub(super) async fn displace_upload(&mut self) -> Result<()> {
        let Some(uploading) = &self.uploading else { return Ok(()) };
        let idle = self.session(&uploading.id).is_none_or(|session| session.idle() > UPLOAD_IDLE);
        if uploading.spare.is_none() || !idle {
            return Err(self.refused(format!("upload {:?} has the spare segment", uploading.id)));
        }
        warn!(upload = uploading.id, "giving up an abandoned upload");
        self.drop_upload().await
    }

    pub(super) async fn drop_upload(&mut self) -> Result<()> {
        let Some(uploading) = self.uploading.take() else { return Ok(()) };
        let chunks = self.session(&uploading.id).map(|session| {
            let fill = session.fill();
            (Arc::clone(fill.layout()), fill.valid_digests())
        });
        self.end_session(&uploading.id);
        match uploading.spare {
            Some(spare) => self.with_area(move |area| area.give_back(spare, chunks, None)).await,
            None => Ok(()),
        }
    }

    pub(super) async fn upload(&mut self, ask: Ask) {
        match ask {
            Ask::Create { id, files, reply } => self.create_upload(id, files, reply).await,
            Ask::Discard { id, reply } => {
                let free =
                    self.uploading.as_ref().map(|uploading| (uploading.id == id, uploading.spare.is_some()));
                let result = match free {
                    Some((true, true)) => {
                        let dropped = self.drop_upload().await;
                        dropped.map_err(|error| UploadError::Gone { id, reason: error.to_string() })
                    }
                    Some((true, false)) => {
                        Err(UploadError::Busy { id, reason: "an update takes it".to_owned() })
                    }
                    _ => Err(UploadError::Unknown { id }),
                };
                let _ = reply.send(result);
            }
        }
    }

    async fn create_upload(
        &mut self,
        id: String,
        mut files: Vec<UploadFile>,
        reply: oneshot::Sender<std::result::Result<UploadStatus, UploadError>>,
    ) {
        files.sort_by(|a, b| a.name.cmp(&b.name));
        let session = self.session(&id);
        if let Some(uploading) = self.uploading.as_mut().filter(|uploading| uploading.id == id) {
            if uploading.files != files {
                let reason = "it was begun with other files".to_owned();
                let _ = reply.send(Err(UploadError::Invalid { id, reason }));
            } else if let Some(session) = session {
                session.touch();
                let _ = reply.send(Ok(session.status()));
            } else {
                uploading.created.push_back(reply);
            }
            return;
        }
        let sizes = files.iter().map(|file| FileSize { name: file.name.clone(), size: file.size }).collect();
        let layout = match Layout::new(self.config.chunk, sizes) {
            Ok(layout) => layout,
            Err(reason) => {
                let _ = reply.send(Err(UploadError::Invalid { id, reason }));
                return;
            }
        };
        let taken = match self.displace_upload().await {
            Ok(()) => self.take(Retain::Memory).await,
            Err(error) => Err(error),
        };
        let (mut spare, limits) = match (taken, self.area.as_ref()) {
            (Ok(spare), Some(area)) => {
                let limits = area.limits(&spare);
                (spare, limits)
            }
            (taken, _) => {
                let reason =
                    taken.err().map_or_else(|| "the segments are lost".to_owned(), |e| e.to_string());
                let _ = reply.send(Err(UploadError::Busy { id, reason }));
                return;
            }
        };
        self.uploading =
            Some(Uploading { id: id.clone(), files, spare: None, created: VecDeque::from([reply]) });
        let (notes, config) = (self.notes.clone(), Arc::clone(&self.config));
        self.tracker.spawn_blocking(move || {
            let allocated = Area::allocate(&limits, &mut spare, layout.segment_size(), &|| false);
            let fill = allocated.and_then(|()| {
                let mapped = spare.segment.map(Arc::new(layout), false);
                let what = "mapping the segment".to_owned();
                let node = || config.node.clone();
                let mapping = mapped.map_err(|error| StageError::Io { node: node(), what, error })?;
                let journal = Journal::begin(&config.state_dir, &id, spare.name(), mapping.layout());
                let journal = journal
                    .inspect_err(|error| {
                        warn!(%error, upload = id, "after a restart of the sidecar this upload begins again");
                    })
                    .ok();
                Ok((Arc::new(Fill::new(mapping)), journal))
            });
            let _ = notes.blocking_send(Note::UploadReady { id, spare: Box::new(spare), fill });
        });
    }

    /// The upload that a predecessor took.
    pub(super) fn go_on_with_upload(&mut self, kept: Kept) {
        let Kept { id, spare, fill, journal } = kept;
        let files = fill.layout().files().iter();
        let files = files.map(|file| UploadFile { name: file.name.clone(), size: file.size }).collect();
        let session = Arc::new(Session::new(id.clone(), fill, Some(journal)));
        let UploadStatus { received, total, .. } = session.status();
        info!(upload = id, received, total, "an upload goes on where it was");
        if let Some(uploads) = &self.uploads {
            uploads.sessions.lock().open(session);
        }
        self.uploading = Some(Uploading { id, files, spare: Some(spare), created: VecDeque::new() });
    }

    pub(super) async fn upload_ready(
        &mut self,
        id: String,
        spare: Spare,
        fill: Result<(Arc<Fill>, Option<Journal>)>,
    ) {
        let Some(uploading) = self.uploading.as_mut().filter(|uploading| uploading.id == id) else {
            let given = self.with_area(move |area| area.give_back(spare, None, None)).await;
            if let Err(error) = given {
                error!(%error, "what is in shared memory cannot be noted");
            }
            return;
        };
        let replies = std::mem::take(&mut uploading.created);
        let answer = match fill {
            Ok((fill, journal)) => {
                uploading.spare = Some(spare);
                let session = Arc::new(Session::new(id, fill, journal));
                session.touch();
                let status = session.status();
                if let Some(uploads) = &self.uploads {
                    uploads.sessions.lock().open(session);
                }
                Ok(status)
            }
            Err(error) => {
                self.uploading = None;
                let reason = error.to_string();
                if let Err(error) = self.with_area(move |area| area.give_back(spare, None, None)).await {
                    error!(%error, "what is in shared memory cannot be noted");
                }
                Err(UploadError::NoSpace { id, reason })
            }
        };
        for reply in replies {
            let _ = reply.send(answer.clone());
        }
    }
}
