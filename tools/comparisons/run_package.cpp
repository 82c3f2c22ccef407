#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <iomanip>
#include <iostream>

// run_package PACKAGE.pt2 HEIGHT WIDTH: the logits of one image whose values are sin(0), sin(1), sin(2), ..., on the
// device that the package was compiled for
int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: run_package PACKAGE.pt2 HEIGHT WIDTH\n";
    return 2;
  }
  c10::InferenceMode mode;
  at::globalContext().setAllowTF32CuDNN(false);  // convolutions of float32 in full, on GPUs
  torch::inductor::AOTIModelPackageLoader loader(argv[1]);
  const at::Device device(loader.get_metadata().at("AOTI_DEVICE_KEY"));
  const int64_t height = std::stoll(argv[2]), width = std::stoll(argv[3]);
  at::Tensor images = at::sin(at::arange(3 * height * width, at::kFloat)).reshape({1, 3, height, width});
  at::Tensor logits = loader.run({images.to(device)})[0].cpu();
  for (int64_t i = 0; i < logits.numel(); ++i) std::cout << std::setprecision(9) << logits[0][i].item<float>() << '\n';
}
