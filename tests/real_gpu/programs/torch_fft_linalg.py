# SPDX-License-Identifier: Apache-2.0
"""cuFFT, cuSOLVER and cuSPARSE through PyTorch."""

import torch
from report import close, digest, report

torch.manual_seed(8)
signal = torch.randn(64, 1000, dtype=torch.float64).cuda()
spectrum = torch.fft.rfft(signal)
close("fft", torch.view_as_real(spectrum).cpu(), torch.view_as_real(torch.fft.rfft(signal.cpu())), 1e-10)
matrix = torch.randn(200, 200, dtype=torch.float64)
positive = (matrix @ matrix.T + 200 * torch.eye(200, dtype=torch.float64)).cuda()
factor = torch.linalg.cholesky(positive)
close("cholesky", (factor @ factor.T).cpu(), positive.cpu(), 1e-10)
solution = torch.linalg.solve(positive, torch.ones(200, 1, dtype=torch.float64).cuda())
close("solve", (positive @ solution).cpu(), torch.ones(200, 1), 1e-9)
values = torch.linalg.eigvalsh(positive)
close("eigenvalues", values.cpu(), torch.linalg.eigvalsh(positive.cpu()), 1e-9)
sparse = torch.randn(300, 300).relu().sub(1).relu().cuda()
dense = torch.randn(300, 40).cuda()
product = torch.sparse.mm(sparse.to_sparse_csr(), dense)
# Its sums are added in another order each time, natively too: compared with the CPU, not bit for bit.
close("sparse", product.cpu(), sparse.cpu() @ dense.cpu(), 1e-5)
report(
    {
        "fft": digest(spectrum),
        "inverse": digest(torch.fft.irfft(spectrum, 1000)),
        "cholesky": digest(factor),
        "solve": digest(solution),
        "eigenvalues": digest(values),
    }
)
